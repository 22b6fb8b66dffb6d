"""Several processes give what one gives. A group of one process runs here, groups of two under torchrun."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mars.checkpoint import load_model
from mars.config import from_dict
from mars.errors import CheckpointError, ConfigError, TrainingError
from mars.model.transformer import is_language
from mars.training.distributed import ShardedProcess, join
from mars.training.process import Process
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

Stage = Callable[..., dict[str, Any]]
ADAMW = {"name": "adamw", "learning_rate": 3e-3, "warmup": 2}
MUON = {"name": "muon", "learning_rate": 3e-3, "matrix_rate": 0.03, "warmup": 2, "average": 0.9}
SEMVIE = {"share_norms": False, "duplicate_output": False, "visual_layers": [0, 2]}


@pytest.fixture
def process() -> Iterator[ShardedProcess]:
    """A group of this process alone: everything is sharded, into one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ShardedProcess(torch.device("cpu"))
    dist.destroy_process_group()


def start(table: dict[str, Any], process: Process | None = None) -> Trainer:
    return Trainer(from_dict(StageConfig, table), process=process)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step() for _ in range(count)]


def close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> bool:
    return all(one == pytest.approx(other, rel=1e-4, abs=1e-6) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": ADAMW},
        {"optimizer": MUON, "accumulate": 2},
        {"optimizer": ADAMW, "recompute": True},
    ],
    ids=["adamw", "muon-in-parts", "recompute"],
)
@pytest.mark.parametrize("semvie", [None, SEMVIE], ids=["pocket", "shared-output"])
def test_sharding_changes_no_loss(
    stage: Stage, process: ShardedProcess, changes: dict[str, Any], semvie: dict[str, Any] | None
) -> None:
    table = stage(**changes)
    if semvie:
        table["model"]["semvie"] = semvie
    wanted = steps(start(table), 8)
    assert len({frozenset(losses) for losses in wanted}) == 2  # both tasks occurred
    trainer = start(table, process)
    assert close(steps(trainer, 8), wanted)
    for name, weight in trainer.transformer.named_parameters():
        assert isinstance(weight, DTensor) or (is_language(name) and name.endswith("norm.weight"))
