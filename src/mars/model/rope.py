"""Rotary positions (Su et al. 2021), halves rotated as in Llama, and the ways in which they reach longer texts.

Letters: B batch, T positions, E head width.
"""

import math

import torch
from torch import Tensor

from mars.model.config import RopeScaling


def rotary_periods(
    head_width: int, *, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """How many positions each pair of channels takes for one radian, (E / 2,) in fp32; the fastest pair comes first.

    The changes of `scaling` are those of `transformers.modeling_rope_utils`: `linear` (kaiokendev 2023), `llama3`
    (Llama 3.1), `yarn` (Peng et al. 2023, section 3.2); `factors` are llama.cpp's, which divide frequencies.
    """
    powers = torch.arange(0, head_width, 2, device=device).float() / head_width
    periods: Tensor = theta**powers
    if scaling is None:
        return periods
    match scaling.kind:
        case "linear":
            return periods * scaling.factor
        case "factors":
            return periods * torch.tensor(scaling.factors, device=device)
        case "llama3":
            turns = scaling.original_positions / (2 * math.pi * periods)
            kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
            return _mix(periods, kept.clamp(0, 1), factor=scaling.factor)
        case "yarn":
            low, high = _yarn_limits(head_width, theta=theta, scaling=scaling)
            ramp = (torch.arange(head_width // 2, device=device).float() - low) / (high - low)
            return _mix(periods, 1 - ramp.clamp(0, 1), factor=scaling.factor)


def _mix(periods: Tensor, kept: Tensor, *, factor: float) -> Tensor:
    """Frequencies of which the share `kept` (0 to 1) stays as it is and the rest is divided by `factor`."""
    return periods / ((1 - kept) / factor + kept)


def _yarn_limits(head_width: int, *, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs of channels between which YaRN goes from frequencies that it keeps to those that it divides."""

    def pair(turns: float) -> float:
        longest = scaling.original_positions / (turns * 2 * math.pi)
        return head_width * math.log(longest) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    return low, high + 0.001 if low == high else high


class Rotary:
    """Cosines and sines of positions. The table grows to the longest position asked for."""

    def __init__(self, head_width: int, *, theta: float, scaling: RopeScaling | None = None) -> None:
        self.head_width = head_width
        self.theta = theta
        self.scaling = scaling
        self.table = torch.empty(2, 0, head_width)

    def at(self, positions_BT: Tensor, *, longest: int, dtype: torch.dtype) -> Tensor:
        """Cosines and sines (2, B, 1, T, E) of positions, all below `longest`."""
        if self.table.shape[1] < longest or self.table.device != positions_BT.device:
            device = positions_BT.device
            periods = rotary_periods(self.head_width, theta=self.theta, scaling=self.scaling, device=device)
            angles = torch.arange(max(2 * longest, 512), device=device)[:, None] / periods
            angles = torch.cat([angles, angles], dim=1)
            self.table = torch.stack([angles.cos(), angles.sin()])
            if self.scaling is not None:
                self.table *= self.scaling.attention_factor
        return self.table[:, positions_BT][:, :, None].to(dtype)


def rotate(x_BHTE: Tensor, rotary: Tensor) -> Tensor:
    """Turns queries or keys (B, H, T, E) by `Rotary.at`; H are heads."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]
