"""What a run measures of itself: means since the last report, speed, use of the device, memory."""

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product says what a device can do."""


class Meter:
    """Sums since the last report. They are stored with a checkpoint, so that a resumed run reports the same means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Values of one step; what is not finite is left out."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of each value over the steps that had it."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def state(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.sums, self.counts = dict(state.get("sums", {})), dict(state.get("counts", {}))


class Pace:
    """Work since the last report, per second of wall-clock time."""

    def __init__(self, *, peak: float) -> None:
        self.peak = peak
        self.start()

    def start(self) -> None:
        """Begins to measure anew."""
        self.started = time.perf_counter()
        self.images = self.tokens = self.flops = 0

    def add(self, *, images: int, tokens: int, flops: int) -> None:
        """One step."""
        self.images += images
        self.tokens += tokens
        self.flops += flops

    def per_second(self) -> dict[str, float]:
        """Images, predicted tokens, and MFU: the share of the device's peak that is spent on the model's products."""
        seconds = time.perf_counter() - self.started
        return {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak,
        }


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of three after one to warm up."""
    size, best = PEAK_SIZE[device.type], 0.0
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    for _ in range(4):
        started = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory(device: torch.device) -> float:
    """The most that this process has held at once, in GiB: of a GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
