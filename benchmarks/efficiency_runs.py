"""What the snapshots of two runs cost in training: ours (`mars train`) and the diffusion baseline's.

Ours are the checkpoints that a run has kept (train with `keep` large and `save_every` as far apart as points of a curve
should be), or that were copied to RUN/snapshots in time. What a step learned is a function of its number and the seed,
so its FLOPs are counted again here, from the examples that it drew (`model/costs.py`, forward and backward); its
seconds are in the run's log. The FLOPs of reading captions with the frozen LLM, which both models do once per caption,
are told apart in both.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mars.checkpoint import read_json
from mars.errors import DataError
from mars.training.process import Process, choose_device
from mars.training.setup import open_stage
from mars.training.stages import StageConfig
from mars.training.task import TaskContext
from mars.training.tasks import TaskMix

OURS, DIFFUSION = "ours", "diffusion"
STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A point of a run."""

    family: str
    """`OURS` or `DIFFUSION`."""
    weights: Path
    """The file with its weights."""
    step: int
    """Over all stages."""
    samples: int
    """Pictures learned from, each as often as it came."""
    flops: int
    """Of training, forward and backward."""
    text_flops: int
    """Of reading each caption once; not part of `flops`."""
    seconds: float
    """Of wall-clock time spent on steps, reading captions included."""

    @property
    def name(self) -> str:
        """As files are called."""
        return f"{self.family}-step-{self.step:06d}"

    def costs(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "weights"}


def our_snapshots(stages: Sequence[StageConfig]) -> list[Snapshot]:
    """The checkpoints of runs that each continued the one before, in order.

    Raises:
        DataError: if a run has left none.
    """
    found: list[Snapshot] = []
    before = Snapshot(family=OURS, weights=Path(), step=0, samples=0, flops=0, text_flops=0, seconds=0.0)
    read: set[tuple[int, ...]] = set()
    for stage in stages:
        folders = _checkpoints(stage)
        if not folders:
            raise DataError(f"{stage.out} holds no checkpoint and no model; train it first, with keep=1000")
        found += _stage_snapshots(stage, folders, before=before, read=read)
        before = found[-1]
    return found


def _checkpoints(stage: StageConfig) -> dict[int, Path]:
    """Folders of models, by step."""
    paths = [path for place in ("checkpoints", "snapshots") for path in (stage.out / place).glob("step-*")]
    matches = {path: STEP.fullmatch(path.name) for path in paths}
    folders = {int(match[1]): path for path, match in matches.items() if match}
    if (stage.out / "model" / "config.json").is_file():
        folders.setdefault(stage.steps, stage.out / "model")
    return dict(sorted(folders.items()))


def _stage_snapshots(
    stage: StageConfig, folders: Mapping[int, Path], *, before: Snapshot, read: set[tuple[int, ...]]
) -> Iterator[Snapshot]:
    opened = open_stage(stage)
    context = TaskContext(
        config=stage,
        process=Process(choose_device("cpu")),
        transformer=opened.transformer,
        text_tokenizer=opened.text_tokenizer,
        loaders=opened.loaders,
        documents=opened.documents,
    )
    mix, samples, flops, text_flops = TaskMix(context), [0], 0, before.text_flops
    speeds = _speeds(stage.out / "log.jsonl")
    for step in range(max(folders)):
        task, batch = mix.draw(step)
        samples.append(samples[-1] + len(batch))
        flops += task.flops(batch)  # nothing was read, so captions do not count
        for prompt in {tuple(one.prompt) for one in batch if hasattr(one, "prompt")} - read:
            read.add(prompt)
            text_flops += context.flops.read_text(len(prompt))
        if step + 1 in folders:
            yield Snapshot(
                family=OURS,
                weights=folders[step + 1] / "visual.safetensors",
                step=before.step + step + 1,
                samples=before.samples + samples[-1],
                flops=before.flops + flops,
                text_flops=text_flops,
                seconds=before.seconds + _seconds(samples, speeds),
            )


def _speeds(log: Path) -> dict[int, float]:
    """Images per second up to a step since the one before, by step."""
    try:
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        speeds = {int(line["step"]): float(line["images_per_second"]) for line in lines if "images_per_second" in line}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{log} must be the log of a run, got: {error}") from None
    if not speeds:
        raise DataError(f"{log} must tell how fast at least one step was, got none; train with a smaller report_every")
    return speeds


def _seconds(samples: Sequence[int], speeds: Mapping[int, float]) -> float:
    """What the steps took: samples of the last step and of all before it."""
    last, ends = len(samples) - 1, [0, *sorted(speeds)]
    seconds = [0.0]
    for start, end in pairwise(ends):
        if end <= last:
            seconds.append(seconds[-1] + (samples[end] - samples[start]) / speeds[end])
    known = ends[: len(seconds)]
    rest = (samples[last] - samples[known[-1]]) / speeds[ends[min(len(seconds), len(ends) - 1)]]
    return seconds[-1] + rest


def diffusion_snapshots(run: Path) -> list[Snapshot]:
    """Those of a run of `diffusion_baseline`.

    Raises:
        DataError: if there are none.
    """
    found = []
    for path in sorted((run / "snapshots").glob("step-*/snapshot.json")):
        table = read_json(path)
        costs = {name: table[name] for name in ("step", "samples", "flops", "text_flops", "seconds")}
        found.append(Snapshot(family=DIFFUSION, weights=path.with_name("unet.safetensors"), **costs))
    if not found:
        raise DataError(f"{run} holds no snapshots; make some with `python -m benchmarks.diffusion_baseline`")
    return found


def spread(snapshots: Sequence[Snapshot], *, most: int) -> list[Snapshot]:
    """At most so many, the last among them, about evenly by the logarithm of their FLOPs."""
    if len(snapshots) <= most:
        return list(snapshots)
    costs = np.log([max(1, one.flops) for one in snapshots])
    wanted = np.linspace(costs[0], costs[-1], most)
    chosen = {int(np.abs(costs - cost).argmin()) for cost in wanted} | {len(snapshots) - 1}
    return [snapshots[place] for place in sorted(chosen)]
