"""What MARS's step of training is compared with: one sequence per row, and other ways to choose the weights.

    Select   both experts on every position, then a select
    Routed   each expert on its own positions, gathered before it and scattered after it, in every layer
    Shared   one set of weights for all positions: a dense model, trained in full
    Joint    the same with one vocabulary and a plain loss: each position's logits are those of text and of codes

All use the modules of a `MarsTransformer`, so that weights, and for the first two losses, are the same. They are
given what a good implementation has: norms are computed once, padding is at the end of a row so that attention is
plainly causal, routing knows its indices before the first layer, skips padding and has a backward pass of its own
(each position is chosen once, so nothing needs to be added up), and all but `Joint` have our loss in chunks. What they
cannot have is a prefix without a graph: text and image positions share every tensor, and that tensor needs a gradient.

Letters: B batch, T positions, D width, H query heads, G key/value heads, E head width, N chosen positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.model.layers import Expert
from mars.model.rope import rotate
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import IGNORE, Modality, Segment
from mars.training.cross_entropy import token_loss

Part = Callable[[Expert, Tensor], tuple[Tensor, ...]]
"""A part of an expert that works on each position alone: (..., in) to one or several (..., out)."""


@dataclass(frozen=True, kw_only=True)
class WholeRows:
    """The segments of a batch as one sequence per row: real positions first, padding at the end."""

    x_BTD: Tensor
    """First hidden states."""
    image_BT: Tensor
    real_BT: Tensor
    targets_BT: Tensor
    """Ids to predict, or IGNORE."""


def join(transformer: MarsTransformer, segments: Sequence[Segment]) -> WholeRows:
    """One sequence per row out of segments that each have one modality."""
    real_BT = torch.cat(
        [torch.ones_like(one.ids, dtype=torch.bool) if one.mask is None else one.mask for one in segments], dim=1
    )
    order_BT = (~real_BT).long().argsort(dim=1, stable=True)

    def ordered(values: list[Tensor]) -> Tensor:
        return torch.cat(values, dim=1).gather(1, order_BT)

    x_BTD = torch.cat([transformer.embed(one) for one in segments], dim=1)
    images = [torch.full_like(one.ids, one.modality is Modality.IMAGE, dtype=torch.bool) for one in segments]
    targets = [torch.full_like(one.ids, IGNORE) if one.targets is None else one.targets for one in segments]
    return WholeRows(
        x_BTD=x_BTD.gather(1, order_BT[..., None].expand_as(x_BTD)),
        image_BT=ordered(images),
        real_BT=real_BT.gather(1, order_BT),
        targets_BT=ordered(targets),
    )


class Mix(Protocol):
    """Runs a part of a layer on whole rows."""

    def __init__(self, rows: WholeRows) -> None: ...

    def __call__(self, layer: SemVIELayer, part: Part, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """(B, T, in) to one or several (B, T, out)."""


class Select:
    """Both experts on every position, and a select."""

    def __init__(self, rows: WholeRows) -> None:
        self.image_BT1 = rows.image_BT[..., None]

    def __call__(self, layer: SemVIELayer, part: Part, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """(B, T, in) to one or several (B, T, out)."""
        assert layer.visual is not None
        both = zip(part(layer.visual, x_BTD), part(layer.language, x_BTD), strict=True)
        return tuple(torch.where(self.image_BT1, visual, language) for visual, language in both)


class _Gather(torch.autograd.Function):
    """Rows by index, each at most once, so that the backward pass copies instead of adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor) -> Tensor:
        ctx.index_N, ctx.shape = index_N, x.shape
        return x.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, ctx.index_N, gradients[0]), None


class _Scatter(torch.autograd.Function):
    """Two sets of rows to their places among `count`; other places are zero."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, indices: tuple[Tensor, Tensor], count: int) -> Tensor:
        ctx.indices = indices
        whole = first.new_zeros(count, first.shape[1])
        return whole.index_copy_(0, indices[0], first).index_copy_(0, indices[1], second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, second = (gradients[0].index_select(0, index) for index in ctx.indices)
        return first, second, None, None


_gather: Callable[[Tensor, Tensor], Tensor] = _Gather.apply
_scatter: Callable[[Tensor, Tensor, tuple[Tensor, Tensor], int], Tensor] = _Scatter.apply


class Routed:
    """Each expert on its own positions of the flattened batch."""

    def __init__(self, rows: WholeRows) -> None:
        text_BT, image_BT = rows.real_BT & ~rows.image_BT, rows.real_BT & rows.image_BT
        self.text_N, self.image_N = (chosen.flatten().nonzero().squeeze(1) for chosen in (text_BT, image_BT))

    def __call__(self, layer: SemVIELayer, part: Part, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """(B, T, in) to one or several (B, T, out); padding becomes zero."""
        assert layer.visual is not None
        flat, shape = x_BTD.flatten(0, 1), x_BTD.shape[:2]
        language = part(layer.language, _gather(flat, self.text_N))
        visual = part(layer.visual, _gather(flat, self.image_N))
        indices = (self.text_N, self.image_N)
        pairs = zip(language, visual, strict=True)
        return tuple(_scatter(one, other, indices, len(flat)).unflatten(0, shape) for one, other in pairs)


class Shared:
    """The LLM's own layer on every position."""

    def __init__(self, rows: WholeRows) -> None:
        pass

    def __call__(self, layer: SemVIELayer, part: Part, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """(B, T, in) to one or several (B, T, out)."""
        return part(layer.language, x_BTD)


class Joint(Shared):
    """The same, as it is when an LLM's vocabulary is enlarged by codes: the loss is over all ids, and not in chunks."""


def _queries_keys_values(expert: Expert, x: Tensor) -> tuple[Tensor, ...]:
    return expert.q_proj(x), expert.k_proj(x), expert.v_proj(x)


def _output(expert: Expert, x: Tensor) -> tuple[Tensor, ...]:
    return (expert.o_proj(x),)


def _feed_forward(expert: Expert, x: Tensor) -> tuple[Tensor, ...]:
    return (expert.feed_forward(x),)


def _attend_causally(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
    """(B, T, H * E), in fp32 on a CPU as `mars.model.layers.attend`."""
    if q_BHTE.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _attend_causally(q_BHTE.float(), k_BGTE.float(), v_BGTE.float())
    mixed = F.scaled_dot_product_attention(q_BHTE, k_BGTE, v_BGTE, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


def _layer(layer: SemVIELayer, x_BTD: Tensor, *, mix: Mix, rotary: Tensor) -> Tensor:
    norms = layer.language
    q, k, v = (
        one.unflatten(2, (-1, norms.heads[2])).transpose(1, 2)
        for one in mix(layer, _queries_keys_values, norms.attention_norm(x_BTD))
    )
    mixed = _attend_causally(rotate(q, rotary), rotate(k, rotary), v)
    x_BTD = x_BTD + mix(layer, _output, mixed)[0]
    return x_BTD + mix(layer, _feed_forward, norms.ffn_norm(x_BTD))[0]


def whole_rows_loss(transformer: MarsTransformer, segments: Sequence[Segment], *, mix: type[Mix]) -> Tensor:
    """Mean cross-entropy of what the last segment should predict, in nats, as `mars.training.losses` has it.

    `segments` are those of text to image or of captioning. The transformer must have a visual expert in every layer
    that shares the LLM's norms, and no norms per head: the paper's on an LLM of the Llama family.
    """
    semvie = transformer.config.semvie
    assert (semvie.share_norms, semvie.duplicate_output, semvie.head_norms) == (True, True, False)
    assert len(transformer.config.visual_layers) == len(transformer.layers)
    assert not transformer.config.language.qk_norm
    rows = join(transformer, segments)
    chosen = mix(rows)
    length = rows.x_BTD.shape[1]
    positions_1T = torch.arange(length, device=rows.x_BTD.device)[None]
    rotary = transformer.rotary.at(positions_1T, longest=length, dtype=rows.x_BTD.dtype)
    x_BTD = rows.x_BTD
    for layer in transformer.layers:
        x_BTD = _layer(cast(SemVIELayer, layer), x_BTD, mix=chosen, rotary=rotary)
    kept = rows.targets_BT != IGNORE
    hidden_ND, targets_N = transformer.language_norm(x_BTD[kept]), rows.targets_BT[kept]
    if mix is Joint:
        logits_NV = torch.cat([transformer.text_logits(hidden_ND), transformer.visual_logits(hidden_ND)], dim=1)
        return F.cross_entropy(logits_NV.float(), targets_N)
    if segments[-1].modality is Modality.TEXT:
        return token_loss(hidden_ND, transformer.text_table, targets_N).loss
    return token_loss(hidden_ND, transformer.visual_table, targets_N - transformer.vocabulary.first_code).loss


def share_weights(transformer: MarsTransformer) -> None:
    """Makes it one dense model that is trained in full: image positions run the LLM's own layers.

    The visual expert is let go; the visual tables stay, as such a model needs embeddings and logits of codes too.
    """
    for layer in transformer.layers:
        layer.visual = layer.language
    for weight in transformer.parameters():
        weight.data = weight.data.clone()  # what is mapped from a file cannot be written
        weight.requires_grad_(True)
