"""Losses of documents: editing, and texts and images in any order.

Letters: B batch, T positions, N positions that predict, D the width of what predicts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mars.model.transformer import MarsTransformer
from mars.sequence.layout import IGNORE, Modality, Segment
from mars.training.cross_entropy import token_loss
from mars.training.losses import begin_loss


class Predictions(NamedTuple):
    """Positions that predict something."""

    states_ND: Tensor
    targets_N: Tensor
    """Of image positions codes, of text positions ids."""


def interleaved_states(transformer: MarsTransformer, segments: Sequence[Segment]) -> dict[str, Predictions]:
    """Runs segments one after the other over one cache.

    Returns:
        Those of the kinds that the segments ask for: `image` (codes of drawn images), `text` (text ids after the first
        image) and `begin` (`<img>` at the end of a text).
    """
    cache = transformer.new_cache()
    found: dict[str, list[Predictions]] = {"image": [], "text": [], "begin": []}
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
                first = transformer.vocabulary.first_code if kind == "image" else 0
                states = transformer.code_states(hidden_BTD, segment.targets) if kind == "image" else hidden_BTD
                found[kind].append(Predictions(states[chosen], segment.targets[chosen] - first))
    return {kind: Predictions(*map(torch.cat, zip(*parts, strict=True))) for kind, parts in found.items() if parts}


def interleaved_losses(
    transformer: MarsTransformer, segments: Sequence[Segment], *, z_loss: float = 0.0
) -> dict[str, Tensor]:
    """Mean cross-entropies in nats, those that there are: `image_loss` per code, `text_loss` per text id, `loss` per
    code and text id, and `begin_image_loss` per `<img>`. `total` is `loss` with the z-loss. The last two have a graph.

    Text ids compete with text ids, codes with the visual rows, and `<img>` with text and special ids, as in the losses
    of one text and one image. Gradients of a text pass the frozen layers into the images before it.
    """
    states = interleaved_states(transformer, segments)
    tables = {"image": transformer.visual_table, "text": transformer.text_table}
    found = {
        kind: token_loss(states[kind].states_ND, table, states[kind].targets_N, z_loss=z_loss)
        for kind, table in tables.items()
        if kind in states
    }
    whole = sum(len(states[kind].targets_N) for kind in found)
    shares = {kind: len(states[kind].targets_N) / whole for kind in found}
    losses = {f"{kind}_loss": one.nats for kind, one in found.items()}
    if found:
        losses["total"] = torch.stack([shares[kind] * one.loss for kind, one in found.items()]).sum()
        losses["loss"] = torch.stack([shares[kind] * one.nats for kind, one in found.items()]).sum()
    if "begin" in states:
        losses["begin_image_loss"] = begin_loss(transformer, states["begin"].states_ND)
    return losses
