"""How many GPU days the three stages take: products to count, divided by what a GPU does in a day.

    GPU days = FLOPs / (peak FLOP/s * utilisation * 86,400)

Utilisation is model FLOPs over peak (MFU; Chowdhery et al. 2022, PaLM, appendix B): recomputed activations, waiting and
input are in it, not in the FLOPs. The paper gives the result, 587 A100 days, and neither its utilisation nor all of its
data. What is not known is an assumption here; it is returned beside every figure, and never the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

from mars.errors import RequestError
from mars.model.costs import FlopCount, image_tokenizer_flops, meta_transformer
from mars.model.presets import Preset

SECONDS_PER_DAY = 86_400
PAPER_A100_DAYS = 587
"""arXiv 2407.07614."""
SD15_A100_DAYS = 6250
"""Stable Diffusion 1.5: the 150,000 hours of its model card, as PixArt-alpha (arXiv 2310.00426) and the paper count."""
PAPER_PAIRS = (200_000_000, 50_000_000, 10_000_000)
"""Of text and image, in stages I, II and III; of these only the first is sure."""
TYPICAL_UTILISATION = 0.4
"""What well-kept trainings of such models report, 0.35 to 0.5; ours."""

GPUS: dict[str, tuple[str, float]] = {
    "a100": ("NVIDIA A100", 312e12),
    "a800": ("NVIDIA A800", 312e12),
    "h100": ("NVIDIA H100 SXM", 989e12),
    "h800": ("NVIDIA H800 SXM", 989e12),
    "h200": ("NVIDIA H200 SXM", 989e12),
    "h20": ("NVIDIA H20", 148e12),
    "b200": ("NVIDIA B200", 2250e12),
    "l40s": ("NVIDIA L40S", 362e12),
    "mi250x": ("AMD Instinct MI250X", 383e12),
    "mi300x": ("AMD Instinct MI300X", 1307e12),
}
"""Peak FLOP/s in bf16 without sparsity, from the vendors' data sheets (half of what they print with sparsity)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage is trained on."""

    name: str
    pairs: int
    epochs: float
    caption: int
    """Ids of a caption, the beginning-of-text id included."""
    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of codes of each picture of a pair: the last is drawn, one before it only read."""
    captioning: bool = False
    """Whether every pair is also learned from image to text."""

    def __post_init__(self) -> None:
        for name in ("pairs", "epochs", "caption"):
            if not 0 < getattr(self, name) < inf:
                raise RequestError(f"{name} of stage {self.name} must be above 0, got {getattr(self, name)}")


def paper_stages(grid: tuple[int, int], *, pairs: Sequence[int] = PAPER_PAIRS) -> list[Stage]:
    """The three stages, each with `pairs`, for pictures of `grid` codes before super-resolution doubles their sides.

    Raises:
        RequestError: if there are not three numbers of pairs above 0.
    """
    if len(pairs) != 3:
        raise RequestError(f"there must be three numbers of pairs, one per stage, got {len(pairs)}")
    double = (2 * grid[0], 2 * grid[1])
    return [
        Stage(name="I alignment", pairs=pairs[0], epochs=1, caption=44, grids=(grid,), captioning=True),
        Stage(name="II refinement", pairs=pairs[1], epochs=2, caption=128, grids=(grid,)),
        Stage(name="III super-resolution", pairs=pairs[2], epochs=1, caption=128, grids=(grid, double)),
    ]


PAIRS_ASSUMED = (
    "pairs: 200M in stage I is the paper's; 50M in stage II and 10M in stage III are remembered, unconfirmed"
)
ASSUMPTIONS = (
    "epochs 1, 2 and 1: remembered, unconfirmed",
    "every pair of stage I is learned in both directions: ours; the paper has both tasks and does not say how often",
    "captions of 44 ids in stage I, of 128 (detailed) in stages II and III: ours",
    "super-resolution doubles both sides and reads the small picture whole: ours; the paper's sizes are not known",
    "a backward pass costs twice the forward pass, once through frozen weights; captions are read anew every epoch; "
    "nothing is recomputed; every picture is encoded once",
    "no failed runs, evaluation, captioning or filtering of data, nor training of the image tokenizer",
)
"""What the figures rest on, beside the pairs."""


def find_gpu(name: str) -> tuple[str, float]:
    """Product and peak FLOP/s of a GPU.

    Raises:
        RequestError: if it is not known.
    """
    if name.lower() not in GPUS:
        raise RequestError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]


def gpu_days(flops: float, *, peak: float, utilisation: float) -> float:
    """Days of one GPU of `peak` FLOP/s.

    Raises:
        RequestError: if the utilisation does not lie in 0..1.
    """
    if not 0 < utilisation <= 1:
        raise RequestError(f"utilisation must lie above 0 and up to 1, got {utilisation}")
    return flops / (peak * utilisation * SECONDS_PER_DAY)


def implied_utilisation(flops: float, *, peak: float, days: float) -> float:
    """The utilisation at which so many FLOPs take so many days; above 1 if they cannot."""
    return flops / (peak * days * SECONDS_PER_DAY)


class Planner:
    """FLOPs of stages for one preset."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.count = FlopCount(meta_transformer(preset.model))

    def sample_flops(self, stage: Stage) -> int:
        """Of one pair in one epoch."""
        codes = prod(stage.grids[-1])
        low = sum(prod(grid) // self.count.slots + 1 for grid in stage.grids[:-1])
        flops = self.count.train_text_to_image(caption=stage.caption, codes=codes, low=low)
        return flops + (self.count.train_captioning(caption=stage.caption, codes=codes) if stage.captioning else 0)

    def stage_flops(self, stage: Stage) -> float:
        """Of a whole stage, the encoding of its pictures included."""
        encode = sum(image_tokenizer_flops(self.preset.image_tokenizer, grid=grid)[0] for grid in stage.grids)
        return stage.pairs * (stage.epochs * self.sample_flops(stage) + encode)

    def total(self, stages: Sequence[Stage]) -> float:
        """FLOPs of all stages."""
        return sum(map(self.stage_flops, stages))


def plan(
    preset: Preset,
    *,
    gpu: str = "a100",
    utilisation: float = TYPICAL_UTILISATION,
    pairs: Sequence[int] = PAPER_PAIRS,
) -> dict[str, Any]:
    """GPU days of each stage and in all, with what they rest on; for qwen-7b, the paper's figure beside them.

    Raises:
        RequestError: if the GPU is unknown, or a number cannot be.
    """
    product, peak = find_gpu(gpu)
    planner, stages = Planner(preset), paper_stages(preset.grid, pairs=pairs)
    rows: dict[str, Any] = {}
    for stage in stages:
        flops = planner.stage_flops(stage)
        rows[stage.name] = {
            "pairs": stage.pairs,
            "epochs": stage.epochs,
            "FLOPs per pair": planner.sample_flops(stage),
            "FLOPs": flops,
            "GPU days": gpu_days(flops, peak=peak, utilisation=utilisation),
        }
    total = planner.total(stages)
    days = gpu_days(total, peak=peak, utilisation=utilisation)
    rows["all"] = {"pairs": sum(pairs), "FLOPs": total, "GPU days": days}
    table: dict[str, Any] = {
        "planner": {"GPU": product, "peak FLOP/s, dense bf16": peak, "utilisation": utilisation},
        "planned stages": rows,
    }
    if preset.name == "qwen-7b":
        table["training budgets in A100 days"] = _budgets(total, utilisation=utilisation)
        if tuple(pairs) == PAPER_PAIRS:
            table["what 587 A100 days would mean"] = _meanings(planner, stages)
    told = PAIRS_ASSUMED if tuple(pairs) == PAPER_PAIRS else "pairs: as given"
    return table | {"assumptions of the planner": [told, *ASSUMPTIONS]}


def _budgets(total: float, *, utilisation: float) -> dict[str, Any]:
    here = gpu_days(total, peak=GPUS["a100"][1], utilisation=utilisation)
    return {
        f"planned here, at a utilisation of {utilisation:g}": here,
        "MARS, as its paper says": PAPER_A100_DAYS,
        "Stable Diffusion 1.5, as the paper and PixArt-alpha say": SD15_A100_DAYS,
        "MARS's share of Stable Diffusion 1.5, from the paper's figures": PAPER_A100_DAYS / SD15_A100_DAYS,
    }


def _meanings(planner: Planner, stages: Sequence[Stage]) -> dict[str, Any]:
    """The utilisation that the paper's figure implies, under our assumptions and under others as good."""
    first, *rest = stages
    variants = {
        "under the assumptions below": [first, *rest],
        "if stage I learned each pair in one direction": [replace(first, captioning=False), *rest],
        "if stage I took two epochs": [replace(first, epochs=2 * first.epochs), *rest],
        "if captions had 128 ids in stage I too": [replace(first, caption=128), *rest],
    }
    table: dict[str, Any] = {}
    for name, variant in variants.items():
        flops = planner.total(variant)
        peak = GPUS["a100"][1]
        table[name] = {
            "FLOPs": flops,
            "implied utilisation": implied_utilisation(flops, peak=peak, days=PAPER_A100_DAYS),
            f"A100 days at {TYPICAL_UTILISATION:g}": gpu_days(flops, peak=peak, utilisation=TYPICAL_UTILISATION),
        }
    return table
