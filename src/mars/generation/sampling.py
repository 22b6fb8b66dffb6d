"""One id out of logits, per row: each row has its own settings and its own source of randomness.

Letters: B rows, V ids to choose from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import RequestError

MAX_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are chosen."""

    temperature: float = 1.0
    """0 takes the likeliest id."""
    top_k: int = 0
    """Keep this many of the likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest ids that together hold this share of the probability."""
    guidance: float = 1.0
    """Classifier-free guidance: 1 is none, more follows the prompt more closely."""
    candidates: int = 1
    """Draw this many and keep the one that the model itself finds likeliest after the prompt, without guidance."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must lie in 0..1 and be greater than 0, got {self.top_p}")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"guidance must lie in 0..100 (1 is none), got {self.guidance}")
        if not 1 <= self.candidates <= MAX_CANDIDATES:
            raise RequestError(f"candidates must lie in 1..{MAX_CANDIDATES}, got {self.candidates}")


def restrict(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) of one row with what top-k and top-p drop at minus infinity."""
    if 0 < sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits_V.sort(descending=True)
        shares = (ordered / sampling.temperature if sampling.temperature else ordered).softmax(dim=0)
        before = shares.cumsum(dim=0) - shares
        logits_V = logits_V.scatter(0, order[before >= sampling.top_p], -torch.inf)
    return logits_V


def sample(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One id per row, (B,). A row's draw depends on its own logits, settings and generator alone.

    Gumbel's trick: the largest of logits plus noise is a draw from their softmax, without a sum or a copy to the host.
    """
    chosen = []
    for logits_V, sampling, generator in zip(logits_BV, samplings, generators, strict=True):
        kept_V = restrict(logits_V, sampling)
        if sampling.temperature > 0:
            uniform_V = torch.rand(kept_V.shape, generator=generator, device=kept_V.device, dtype=torch.float64)
            noise_V = -torch.log(-torch.log(uniform_V.clamp(min=1e-300)))
            kept_V = kept_V.double() / sampling.temperature + noise_V
        chosen.append(kept_V.argmax())
    return torch.stack(chosen)
