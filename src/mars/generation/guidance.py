"""Classifier-free guidance (Ho and Salimans 2022): rows with and without their prompt run in one batch.

    rows of a batch     [ picture 0 | picture 0, prompt-free | picture 1 | picture 2, prompt-free | picture 2 ]

Only pictures that are guided have a second row, so guidance 1 costs nothing and changes nothing.

Letters: B rows, P pictures, K codes of a step, V ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Guidance:
    """Which row is whose, and how strongly pictures are guided.

    Args:
        rows: of each row, the number of its picture and whether it is the prompt-free one.
        scales: of each picture; 1 is none.
    """

    def __init__(self, rows: Sequence[tuple[int, bool]], scales: Sequence[float], *, device: torch.device) -> None:
        prompted = {picture: row for row, (picture, free) in enumerate(rows) if not free}
        free = {picture: row for row, (picture, free) in enumerate(rows) if free}
        guided = sorted(free)
        self.guided = torch.tensor(guided, dtype=torch.long, device=device)
        self.picture_B = torch.tensor([picture for picture, _ in rows], device=device)
        self.prompted_P = torch.tensor([prompted[picture] for picture in range(len(scales))], device=device)
        self.free = torch.tensor([free[picture] for picture in guided], dtype=torch.long, device=device)
        self.scales = torch.tensor([scales[picture] for picture in guided], device=device)[:, None, None]

    def prompted(self, of_BKD: Tensor) -> Tensor:
        """Logits (P, K, V), or states (P, K, D), after the prompts, not guided."""
        return of_BKD[self.prompted_P]

    def combine(self, of_BKD: Tensor, within_PK: Tensor | None = None) -> Tensor:
        """Guided logits (P, K, V), or guided states (P, K, D), whose logits are those.

        Args:
            within_PK: codes that are guided; null where all are whose pictures have a prompt-free row.
        """
        of_PKD = self.prompted(of_BKD)
        if len(self.guided):
            free, prompted = of_BKD[self.free], of_PKD[self.guided]
            guided = free + self.scales.to(free) * (prompted - free)
            if within_PK is not None:
                guided = torch.where(within_PK[self.guided][..., None], guided, prompted)
            of_PKD[self.guided] = guided
        return of_PKD

    def spread(self, of_P: Tensor) -> Tensor:
        """What pictures have (P, ...), for their rows (B, ...)."""
        return of_P[self.picture_B]
