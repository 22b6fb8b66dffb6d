"""Cross-entropy of a large vocabulary, in chunks: the logits of all positions never stand in memory together.

The gradient is computed beside the loss, chunk by chunk, while the chunk's logits are there (as Liger Kernel does, Hsu
et al. 2024, arXiv 2410.10989). Memory is that of one chunk and of the gradients, whatever positions x vocabulary is.

Letters: N positions, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**23
"""Logits of a chunk: 32 MiB in fp32, and twice that for a moment."""


class TokenLoss(NamedTuple):
    """What a prediction cost; all but `loss` are for the log and carry no gradient."""

    loss: Tensor
    """Mean over positions of cross-entropy and z-loss: what is trained on."""
    nats: Tensor
    """Mean cross-entropy, in nats per token."""
    logit_norm: Tensor
    """Mean L2 norm of a position's logits: grows where logits drift."""


def token_loss(states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, *, z_loss: float = 0.0) -> TokenLoss:
    """Cross-entropy of targets under softmax(states @ table.T), with `z_loss` times the mean squared log of its
    denominator (Chowdhery et al. 2022, PaLM, section 5).

    Products take the dtype of autocast where it is on; sums and the softmax are fp32.
    """
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (states_ND, table_VD))
    found = _TokenLoss.apply(states_ND, table_VD, targets_N, z_loss, wanted)  # type: ignore[no-untyped-call]
    return TokenLoss(*found)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, z_loss: float, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, count, rows = states_ND.device.type, len(states_ND), max(1, CHUNK // len(table_VD))
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_ND.dtype
        sums = torch.zeros(3, device=states_ND.device)
        grad_states = torch.empty_like(states_ND) if wanted[0] else None
        grad_table = torch.zeros_like(table_VD) if wanted[1] else None
        with torch.autocast(device, enabled=False):
            states, table = states_ND.to(lower), table_VD.to(lower)
            for start in range(0, count, rows):
                chunk = slice(start, start + rows)
                weight = 1 / count if any(wanted) else None
                figures, slopes = _chunk(states[chunk], table, targets_N[chunk], z_loss=z_loss, weight=weight)
                sums += figures
                if slopes is None:
                    continue
                slopes = slopes.to(lower)
                if grad_states is not None:
                    grad_states[chunk] = slopes @ table
                if grad_table is not None:
                    grad_table += slopes.T @ states[chunk]
                del slopes  # before the next logits are there
        ctx.grads = grad_states, grad_table
        nats, squares, norm = (sums / count).unbind()
        ctx.mark_non_differentiable(nats, norm)
        return nats + z_loss * squares, nats, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, table = (None if grad is None else grad * slope for grad in ctx.grads)
        return states, table, None, None, None


def _chunk(
    states_ND: Tensor, table_VD: Tensor, targets_N: Tensor, *, z_loss: float, weight: float | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over some positions of cross-entropy, squared log of the denominator and logit norm; and with `weight` the
    slope (N, V) of so many times their loss at each logit."""
    logits_NV = F.linear(states_ND, table_VD).float()
    norms_N = torch.linalg.vector_norm(logits_NV, dim=1)
    chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    largest_N = logits_NV.amax(dim=1)
    shares_NV = logits_NV.sub_(largest_N[:, None]).exp_()  # in the memory of the logits, which are not needed again
    totals_N = shares_NV.sum(dim=1)
    denominators_N = totals_N.log() + largest_N
    sums = torch.stack([(denominators_N - chosen_N).sum(), denominators_N.square().sum(), norms_N.sum()])
    if weight is None:
        return sums, None
    slopes_NV = shares_NV.mul_((weight * (1 + 2 * z_loss * denominators_N) / totals_N)[:, None])
    return sums, slopes_NV.scatter_add_(1, targets_N[:, None], torch.full_like(chosen_N, -weight)[:, None])
