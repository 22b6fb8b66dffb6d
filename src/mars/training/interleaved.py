"""Losses of documents: editing, and texts and images in any order.

Letters: B batch, T positions, N positions that predict, D the width of what predicts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.model.transformer import MarsTransformer
from mars.sequence.layout import IGNORE, Modality, Segment

Predictions = dict[str, tuple[Tensor, Tensor]]


def interleaved_states(transformer: MarsTransformer, segments: Sequence[Segment]) -> Predictions:
    """Runs segments one after the other over one cache.

    Returns:
        States (N, D), and the ids (N,) that each should predict, of the kinds that the segments ask for: `image` (codes
        of drawn images), `text` (text ids after the first image) and `begin` (`<img>` at the end of a text).
    """
    cache = transformer.new_cache()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"image": [], "text": [], "begin": []}
    seen = False
    for segment in segments:
        image = segment.modality is Modality.IMAGE
        seen |= image
        with torch.set_grad_enabled(torch.is_grad_enabled() and seen):  # text before depends on nothing trained
            hidden_BTD = transformer(segment, cache)
        if segment.targets is None:
            continue
        begins = (segment.targets == transformer.vocabulary.image_start) & (not image)
        rest = (segment.targets != IGNORE) & ~begins
        for kind, chosen in (("image" if image else "text", rest), ("begin", begins)):
            if bool(chosen.any()):
                found[kind].append((hidden_BTD[chosen], segment.targets[chosen]))
    return {kind: _joined(pairs) for kind, pairs in found.items() if pairs}


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    states, targets = zip(*pairs, strict=True)
    return torch.cat(states), torch.cat(targets)


def interleaved_losses(transformer: MarsTransformer, segments: Sequence[Segment]) -> dict[str, Tensor]:
    """Mean cross-entropies in nats: `image_loss` per code, `text_loss` per text id, `begin_loss` per drawn image.

    Text ids compete with text ids, codes with the visual rows, and `<img>` with text and special ids, as in the losses
    of one text and one image. Gradients of a text pass the frozen layers into the images before it.
    """
    losses = {}
    for kind, (states_ND, targets_N) in interleaved_states(transformer, segments).items():
        if kind == "image":
            logits = transformer.visual_logits(states_ND).float()
            losses["image_loss"] = F.cross_entropy(logits, targets_N - transformer.vocabulary.first_code)
        elif kind == "text":
            losses["text_loss"] = F.cross_entropy(transformer.text_logits(states_ND).float(), targets_N)
        else:
            losses["begin_loss"] = begin_loss(transformer, states_ND)
    return losses


def begin_loss(transformer: MarsTransformer, states_ND: Tensor) -> Tensor:
    """Mean cross-entropy of `<img>` among text and special ids after texts whose last states are given."""
    text_N = torch.logsumexp(transformer.text_logits(states_ND).float(), dim=1)
    special = transformer.special_logits(states_ND).float()
    return (torch.logsumexp(torch.cat([text_N[:, None], special], dim=1), dim=1) - special[:, 0]).mean()
