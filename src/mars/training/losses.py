"""What a batch is trained on.

Letters: B batch, T positions, N positions that predict, D the width of what predicts.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mars.model.cache import Cache, Prefix
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import IGNORE, drawn_image, read_image, written_text
from mars.training import cross_entropy
from mars.training.cross_entropy import token_loss


def text_to_image_states(
    transformer: MarsTransformer, codes_BRC: Tensor, prefixes: Sequence[Prefix]
) -> tuple[Tensor, Tensor]:
    """States (N, D) that predict codes after their captions, and the codes (N,) that each should predict."""
    cache: Cache = transformer.new_cache()
    cache.load(prefixes)
    segment = drawn_image(codes_BRC, transformer.vocabulary)
    assert segment.targets is not None
    states = transformer.code_states(transformer(segment, cache), segment.targets)
    return states.flatten(0, -2), (segment.targets - transformer.vocabulary.first_code).flatten()


def text_to_image_loss(transformer: MarsTransformer, codes_BRC: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
    """Mean cross-entropy of the codes after their captions, in nats per code."""
    states_ND, targets_N = text_to_image_states(transformer, codes_BRC, prefixes)
    return token_loss(states_ND, transformer.visual_table, targets_N).loss


def begin_image_loss(transformer: MarsTransformer, prefixes: Sequence[Prefix]) -> Tensor:
    """Mean cross-entropy of `<img>` after a whole caption, among text and special ids: when to draw."""
    return begin_loss(transformer, torch.stack([prefix.last_hidden for prefix in prefixes]))


def begin_loss(transformer: MarsTransformer, states_ND: Tensor) -> Tensor:
    """The same after texts whose last states are given; their gradients pass the frozen head where they have any.

    Logits of text ids are made in chunks, as in `training.cross_entropy`, and again in the backward pass.
    """

    def denominators(chunk_ND: Tensor) -> Tensor:
        return torch.logsumexp(transformer.text_logits(chunk_ND).float(), dim=1)

    rows = max(1, cross_entropy.CHUNK // len(transformer.text_table))
    chunks = [
        cast(Tensor, checkpoint(denominators, one, use_reentrant=False, preserve_rng_state=False))
        for one in states_ND.split(rows)
    ]
    text_N = torch.cat(chunks)
    special = transformer.special_logits(states_ND).float()
    everything_N = torch.logsumexp(torch.cat([text_N[:, None], special], dim=1), dim=1)
    return (everything_N - special[:, 0]).mean()


def captioning_states(
    transformer: MarsTransformer,
    codes_BRC: Tensor,
    captions: Sequence[Sequence[int]],
    *,
    hints: Sequence[Sequence[int]],
    end: int,
) -> tuple[Tensor, Tensor]:
    """States (N, D) at text positions after their images, and the ids (N,) that each should predict; gradients pass
    through the frozen layers into the images' keys and values."""
    cache: Cache = transformer.new_cache()
    transformer(read_image(codes_BRC, transformer.vocabulary), cache)
    segment = written_text(captions, transformer.vocabulary, hints=hints, end=end).to(codes_BRC.device)
    assert segment.targets is not None
    kept = segment.targets != IGNORE
    return transformer(segment, cache)[kept], segment.targets[kept]


def captioning_loss(
    transformer: MarsTransformer,
    codes_BRC: Tensor,
    captions: Sequence[Sequence[int]],
    *,
    hints: Sequence[Sequence[int]],
    end: int,
) -> Tensor:
    """Mean cross-entropy of the captions after their images, in nats per text id."""
    states_ND, targets_N = captioning_states(transformer, codes_BRC, captions, hints=hints, end=end)
    return token_loss(states_ND, transformer.text_table, targets_N).loss
