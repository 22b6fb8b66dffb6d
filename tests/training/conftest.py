"""A tiny transformer in both shapes, the gradients that a loss gives it, and runs over it."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mars.config import from_dict
from mars.model.transformer import MarsTransformer
from mars.training.optim import optimizer_tensors
from mars.training.process import Process
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

Stage = Callable[..., dict[str, Any]]
"""The fixture `stage`."""
OPTIMIZERS = {
    "adamw": {"name": "adamw", "learning_rate": 3e-3, "warmup": 2},
    "muon": {"name": "muon", "learning_rate": 3e-3, "matrix_rate": 0.03, "warmup": 2, "decay": 4},
}


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def gradients(transformer: MarsTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


def start(table: dict[str, Any], process: Process | None = None) -> Trainer:
    return Trainer(from_dict(StageConfig, table), process=process)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step() for _ in range(count)]


def slots(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizers remember."""
    return optimizer_tensors(trainer.optimizers, {id(weight): name for name, weight in trainer.weights.items()})


def visual(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.transformer.visual_tensors().items()}
