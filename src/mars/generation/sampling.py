"""One id out of logits, per row: each row has its own settings and its own source of randomness.

Letters: B rows, V ids to choose from, K codes of a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import RequestError

MAX_CANDIDATES = 64
MAX_WINDOW = 64
NOISE_PLACES = 16
"""Codes of a picture whose noise is made at once: a megabyte of it."""


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
    guidance_stop: float = 1.0
    """Guide this share of an image's codes, from the first; the rest follow the prompt alone, in half the rows."""
    candidates: int = 1
    """Draw this many and keep the one that the model itself finds likeliest after the prompt, without guidance."""
    window: int = 1
    """Codes of an image that a step reads; more than 1 draws by speculative Jacobi decoding (`jacobi.py`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must lie in 0..1 and be greater than 0, got {self.top_p}")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"guidance must lie in 0..100 (1 is none), got {self.guidance}")
        if not 0 <= self.guidance_stop <= 1:
            raise RequestError(f"guidance_stop must lie in 0..1 (1 guides every code), got {self.guidance_stop}")
        if not 1 <= self.candidates <= MAX_CANDIDATES:
            raise RequestError(f"candidates must lie in 1..{MAX_CANDIDATES}, got {self.candidates}")
        if not 1 <= self.window <= MAX_WINDOW:
            raise RequestError(f"window must lie in 1..{MAX_WINDOW} (1 is off), got {self.window}")


class Sampler:
    """The settings of several rows as tensors: made once, used at every step."""

    def __init__(self, samplings: Sequence[Sampling], *, device: torch.device) -> None:
        self.warm = any(one.temperature > 0 for one in samplings)
        """Whether any row needs noise."""
        temperatures = [one.temperature or 1.0 for one in samplings]
        self.temperatures_B1 = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
        top_k = [min(one.top_k, 2**31) for one in samplings]  # any number may be asked for; torch knows 64 bits
        self.top_k = _chosen(top_k, rest=0, device=device)
        self.most = max(top_k)
        self.top_p = _chosen([one.top_p for one in samplings], rest=1, device=device)
        cold = [row for row, one in enumerate(samplings) if not one.temperature]
        self.cold = torch.tensor(cold, dtype=torch.long, device=device)

    def restrict(self, logits_BV: Tensor) -> Tensor:
        """Logits with what top-k and top-p drop at minus infinity."""
        if self.top_k is not None:
            rows, counts = self.top_k
            chosen, few = logits_BV[rows], counts.clamp(max=logits_BV.shape[1])
            least = chosen.topk(min(self.most, logits_BV.shape[1])).values.gather(1, few[:, None] - 1)
            logits_BV = logits_BV.clone()
            logits_BV[rows] = chosen.masked_fill(chosen < least, -torch.inf)
        if self.top_p is not None:
            rows, shares = self.top_p
            chosen = logits_BV[rows]
            ordered, order = chosen.sort(descending=True)
            spread = (ordered / self.temperatures_B1[rows].to(ordered)).softmax(dim=1)
            late = spread.cumsum(dim=1) - spread >= shares[:, None]
            logits_BV = logits_BV.clone()
            logits_BV[rows] = chosen.masked_fill(torch.zeros_like(late).scatter(1, order, late), -torch.inf)
        return logits_BV

    def shares(self, logits_BV: Tensor) -> Tensor:
        """The probability of each id (B, V) in fp32; all of it the likeliest's for rows without a temperature."""
        kept_BV = self.restrict(logits_BV).float()
        shares_BV = (kept_BV / self.temperatures_B1.float()).softmax(dim=1)
        if len(self.cold):
            likeliest = kept_BV[self.cold].argmax(1, keepdim=True)
            shares_BV[self.cold] = torch.zeros_like(shares_BV[self.cold]).scatter_(1, likeliest, 1)
        return shares_BV

    def choose(self, logits_BV: Tensor, noise_BV: Tensor | None) -> Tensor:
        """One id per row, (B,): a row's depends on its own logits, settings and noise alone.

        Args:
            noise_BV: `gumbel` noise in float64, zeros for rows without a temperature; null where no row needs any.
        """
        kept_BV = self.restrict(logits_BV)
        if noise_BV is None:
            return kept_BV.argmax(dim=1)
        return (kept_BV.double() / self.temperatures_B1 + noise_BV).argmax(dim=1)


def _chosen(values: Sequence[float], *, rest: float, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Rows with another value than `rest`, and their values; null without any."""
    rows = [row for row, value in enumerate(values) if value != rest]
    if not rows:
        return None
    return torch.tensor(rows, device=device), torch.tensor([values[row] for row in rows], device=device)


def gumbel(generator: torch.Generator, *shape: int) -> Tensor:
    """Noise in float64: the largest of logits plus noise is a draw from their softmax (Gumbel's trick)."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return uniform.clamp_(min=1e-300).log_().neg_().log_().neg_()


class Noise:
    """The noise of one picture's codes: a function of its seed and of the place of a code, whatever is drawn beside it.

    It is made for many places at once, which is quicker.
    """

    def __init__(self, seed: int, *, block: int, ids: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.block = block
        self.ids = ids
        self.steps = max(1, NOISE_PLACES // block)
        self.step = 0
        self.ahead = torch.empty(0)

    def take(self) -> Tensor:
        """The noise of the next step, (K, V)."""
        place = self.step % self.steps
        if not place:
            self.ahead = gumbel(self.generator, self.steps, self.block, self.ids)
        self.step += 1
        return self.ahead[place]


def sample(logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One id per row, (B,), with noise from a generator each, where the row's temperature asks for it."""
    sampler, ids = Sampler(samplings, device=logits_BV.device), logits_BV.shape[1]
    if not sampler.warm:
        return sampler.choose(logits_BV, None)
    noise = [
        gumbel(generator, ids) if one.temperature else logits_BV.new_zeros(ids, dtype=torch.float64)
        for one, generator in zip(samplings, generators, strict=True)
    ]
    return sampler.choose(logits_BV, torch.stack(noise))
