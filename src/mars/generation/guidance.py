"""Classifier-free guidance (Ho and Salimans 2022): rows with and without their prompt run in one batch.

    rows of the batch   [ request 0 | request 1 | ... | prompt-free 0 | prompt-free 2 | ... ]

Only requests that are guided have a second row, so guidance 1 costs nothing and changes nothing.

Letters: B requests, V ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Guidance:
    """Which rows are guided, and how strongly. `scales` holds one number per request; 1 is none."""

    def __init__(self, scales: Sequence[float]) -> None:
        self.guided = [index for index, scale in enumerate(scales) if scale != 1]
        self.count = len(scales)
        self.scales = torch.tensor([scales[index] for index in self.guided])[:, None]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.count + len(self.guided)

    def combine(self, logits: Tensor) -> Tensor:
        """Logits (rows, V) of the whole batch to guided logits (B, V)."""
        if not self.guided:
            return logits
        prompted, free = logits[: self.count], logits[self.count :]
        guided = free + self.scales.to(logits) * (prompted[self.guided] - free)
        return prompted.index_copy(0, torch.tensor(self.guided, device=logits.device), guided)

    def spread(self, ids_B: Tensor) -> Tensor:
        """Chosen ids (B,) to the rows of the batch (rows,)."""
        return torch.cat([ids_B, ids_B[self.guided]]) if self.guided else ids_B
