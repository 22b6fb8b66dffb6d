"""What an image position makes of a cell of codes, and predicts of the next one: code by code, in raster order.

A cell is a square of K codes that share one position of the transformer. Its state is the context of all of them; a
code also hears those before it in its cell. So every code is predicted from all codes before it, as without cells, by
a transformer that runs a Kth of the positions. (Ours; RQ-Transformer, Lee et al. 2022, arXiv 2203.01941, and MEGABYTE,
Yu et al. 2023, arXiv 2305.07185, split the work in a similar way.)

    state of the position --Linear--> context of slot 0 | slot 1 | slot 2 | slot 3
    slot j: context + sum of embeddings of the codes in slots < j -> blocks -> state of slot j -> head -> code

Letters: B batch, T positions, K codes of a cell, D width of the visual expert, E width of the cell, V codes.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.model.layers import Linear, Norm

BLOCKS = 2
FFN = 2
"""Times the cell's width."""


Product = Callable[[str, nn.Module, Tensor], Tensor]
"""What a layer makes of an x; its name tells it from others."""


def plain(name: str, linear: nn.Module, x: Tensor) -> Tensor:  # noqa: ARG001
    """As the layer itself."""
    product: Tensor = linear(x)
    return product


class CellBlock(nn.Module):
    """A residual SwiGLU layer, the same for all slots."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.norm = Norm(width, eps=eps)
        self.gate_proj = Linear(width, FFN * width, bias=False)
        self.up_proj = Linear(width, FFN * width, bias=False)
        self.down_proj = Linear(FFN * width, width, bias=False)

    def forward(self, x: Tensor, product: Product = plain, name: str = "") -> Tensor:
        """(..., E), the same out."""
        normal = self.norm(x)
        gate, up = (product(f"{name}.{one}", getattr(self, one), normal) for one in ("gate_proj", "up_proj"))
        return x + product(f"{name}.down_proj", self.down_proj, F.silu(gate) * up)


class CellHead(nn.Module):
    """States of a cell's codes out of the state of its position."""

    def __init__(self, *, width: int, cell_width: int, slots: int, num_codes: int, eps: float) -> None:
        super().__init__()
        self.slots, self.num_codes = slots, num_codes
        self.contexts = nn.ModuleList(Linear(width, cell_width, bias=False) for _ in range(slots))
        rows = (slots - 1) * num_codes
        self.codes = nn.Embedding(rows, cell_width, _weight=torch.empty(rows, cell_width))
        self.blocks = nn.ModuleList(CellBlock(cell_width, eps=eps) for _ in range(BLOCKS))
        self.norm = Norm(cell_width, eps=eps)

    def forward(self, hidden_BTD: Tensor, codes_BTK: Tensor) -> Tensor:
        """States (B, T, K, E) that predict each code of known cells; of the last code of a cell nothing is heard."""
        x_BTKE = torch.stack([context(hidden_BTD) for context in self.contexts], dim=2)
        heard = self._embed(codes_BTK[..., :-1]).cumsum(dim=2)
        return self._finish(x_BTKE + F.pad(heard, (0, 0, 1, 0)))

    def next_state(self, hidden_BTD: Tensor, chosen: Sequence[Tensor], product: Product = plain) -> Tensor:
        """The state (B, T, E) of the first slot that has no code yet.

        Args:
            chosen: the codes (B, T) of the slots before it.
            product: multiplies by the weights of a layer.
        """
        slot = len(chosen)
        x_BTE = product(f"visual_cells.contexts.{slot}", self.contexts[slot], hidden_BTD)
        if chosen:
            x_BTE = x_BTE + self._embed(torch.stack(list(chosen), dim=-1)).sum(dim=2).to(x_BTE.dtype)
        return self._finish(x_BTE, product)

    def _embed(self, codes: Tensor) -> Tensor:
        """Codes of the first slots (..., j) to (..., j, E)."""
        first = torch.arange(codes.shape[-1], device=codes.device) * self.num_codes
        found: Tensor = self.codes(codes + first)
        return found

    def _finish(self, x: Tensor, product: Product = plain) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, product, f"visual_cells.blocks.{number}")
        out: Tensor = self.norm(x)
        return out

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Starting weights: blocks begin as the identity, codes are hardly heard."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1)
            elif name.endswith("down_proj.weight"):
                weight.zero_()
            else:
                scale = 0.1 if name.startswith("codes") else weight.shape[1] ** -0.5
                weight.normal_(0, scale, generator=generator)
