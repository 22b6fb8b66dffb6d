"""The parts of a decoder layer: linear, norm, attention, feed-forward. Rotary positions are in `model/rope.py`.

Letters: B batch, T positions, S keys, D width, H query heads, G key/value heads, E head width, F feed-forward width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.model.quantized import QuantizedLinear, multiply

SMALL_BATCH = range(2, 8)
"""Rows for which a CPU multiplies faster with the weights on the left (measured: 2.3 times at 2 rows, fp32)."""


class Linear(nn.Linear):
    """`nn.Linear`, with a quicker product for a few rows on a CPU when no graph is built."""

    def reset_parameters(self) -> None:
        """As `nn.Linear`, but not on the meta device: "random" numbers there import sympy, a second of a cold start."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.numel() // x.shape[-1]
        few = SMALL_BATCH.start <= rows < SMALL_BATCH.stop  # `in` cannot be compiled
        if not torch.is_grad_enabled() and x.device.type == "cpu" and few:
            product = (self.weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
            return product if self.bias is None else product + self.bias
        return F.linear(x, self.weight, self.bias)


def apply_all(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """What each layer makes of one x; layers of few bits do it in one go."""
    if isinstance(linears[0], QuantizedLinear):
        return multiply(x, cast(Sequence[QuantizedLinear], linears))
    return [linear(x) for linear in linears]


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019), computed in fp32 as LLMs of the Llama family do."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width), the same out."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


def attend(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of T queries over S keys, (B, T, H * E).

    `mask` is (B, 1, T, S), (1, 1, T, S) or null where every query sees every key.
    """
    if q_BHTE.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # A CPU's attention is three times slower backward in bf16 than in fp32, whatever its matrix units (measured).
        with torch.autocast("cpu", enabled=False):
            return attend(q_BHTE.float(), k_BGSE.float(), v_BGSE.float(), mask)
    groups = q_BHTE.shape[1] // k_BGSE.shape[1]
    if groups > 1 and q_BHTE.shape[2] == 1:
        # One query: the H / G heads that share a key act as H / G queries of one head, and nothing is copied.
        batch, heads, _, width = q_BHTE.shape
        mixed = F.scaled_dot_product_attention(
            q_BHTE.view(batch, heads // groups, groups, width), k_BGSE, v_BGSE, attn_mask=mask
        )
        return mixed.reshape(batch, 1, heads * width)
    mixed = F.scaled_dot_product_attention(q_BHTE, k_BGSE, v_BGSE, attn_mask=mask, enable_gqa=groups > 1)
    return mixed.transpose(1, 2).flatten(2)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of the new positions, heads apart and not yet rotated, to (B, T, H * E)."""


class Expert(nn.Module):
    """One modality's weights of one layer; norms and the output projection may belong to the other expert."""

    def __init__(
        self,
        *,
        width: int,
        ffn: int,
        heads: tuple[int, int, int],
        eps: float,
        qkv_bias: bool,
        qk_norm: bool,
        head_norms: bool = False,
        own_norms: bool = True,
        own_output: bool = True,
    ) -> None:
        super().__init__()
        num_heads, num_kv_heads, head_width = heads
        self.heads = heads
        if own_norms:
            self.attention_norm = Norm(width, eps=eps)
            self.ffn_norm = Norm(width, eps=eps)
        self.q_proj = Linear(width, num_heads * head_width, bias=qkv_bias)
        self.k_proj = Linear(width, num_kv_heads * head_width, bias=qkv_bias)
        self.v_proj = Linear(width, num_kv_heads * head_width, bias=qkv_bias)
        self.head_norms = head_norms
        if head_norms or (own_norms and qk_norm):
            self.q_norm = Norm(head_width, eps=eps)
            self.k_norm = Norm(head_width, eps=eps)
        if head_norms:
            self.v_norm = Norm(head_width, eps=eps)
        if own_output:
            self.o_proj = Linear(num_heads * head_width, width, bias=False)
        self.gate_proj = Linear(width, ffn, bias=False)
        self.up_proj = Linear(width, ffn, bias=False)
        self.down_proj = Linear(ffn, width, bias=False)

    def forward(
        self, x_BTD: Tensor, attention: Attention, *, norms: Mapping[str, Norm], output: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one segment's positions.

        Args:
            norms: those on the way, by name; they and `output`, the projection behind attention, may be another's.

        Returns:
            hidden states (B, T, D), and the keys and values (B, G, T, E) that attention was given. Gradients of later
            segments come back through these two, which FSDP must be told (training/distributed.py).
        """
        q, k, v = self.project(norms["attention_norm"](x_BTD))
        if "q_norm" in norms:
            q, k = norms["q_norm"](q), norms["k_norm"](k)
        if "v_norm" in norms:
            v = norms["v_norm"](v)
        x_BTD = x_BTD + output(attention(q, k, v))
        return x_BTD + self.feed_forward(norms["ffn_norm"](x_BTD)), k, v

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E), keys and values (B, G, T, E) of normalised input, not yet rotated."""
        num_heads, num_kv_heads, head_width = self.heads
        batch, length, _ = x_BTD.shape

        def split(projected: Tensor, count: int) -> Tensor:
            return projected.view(batch, length, count, head_width).transpose(1, 2)

        q, k, v = apply_all(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        return split(q, num_heads), split(k, num_kv_heads), split(v, num_kv_heads)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """SwiGLU (Shazeer 2020) of normalised input, (B, T, D)."""
        gate, up = apply_all(x_BTD, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out
