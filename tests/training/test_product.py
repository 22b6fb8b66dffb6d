from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.adapter import CONFIG, WEIGHTS, load_adapted, read_adapter
from mars.checkpoint import load_model, read_json, read_tensors, write_json
from mars.config import from_dict
from mars.errors import CheckpointError, ConfigError
from mars.training.runstate import write_state
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer
from tests.training.conftest import OPTIMIZERS, Stage, start, visual

Configure = Callable[..., StageConfig]


@pytest.fixture
def adapting(stage: Callable[..., dict[str, Any]], tiny_model: Path) -> Configure:
    """The configuration of a stage that trains an adapter of the tiny model."""

    def configured(**changes: Any) -> StageConfig:
        table = stage(stage="align", model={"start_from": str(tiny_model)}, lora={"rank": 2, "dropout": 0.2})
        return from_dict(StageConfig, table | {"steps": 6, "optimizer": {"learning_rate": 0.02, "warmup": 1}} | changes)

    return configured


def kept(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.weights.items()}


def test_adapters_alone_are_trained_and_have_optimizer_states(adapting: Configure) -> None:
    trainer = Trainer(adapting())
    before = {name: weight.detach().clone() for name, weight in trainer.transformer.named_parameters()}
    trainer.train()
    for name, weight in trainer.transformer.named_parameters():
        assert torch.equal(weight, before[name]) != (name in trainer.weights)
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert len(states) == len(trainer.weights)
    assert all(".lora_" in name for name in trainer.weights)


def test_a_run_leaves_an_adapter_that_draws_as_it_did(adapting: Configure, tiny_model: Path) -> None:
    trainer = Trainer(adapting())
    trainer.train()
    assert {path.name for path in (trainer.config.out / "adapter").iterdir()} == {CONFIG, WEIGHTS}
    assert not (trainer.config.out / "model").exists()
    found = read_adapter(trainer.config.out / "adapter").tensors()
    assert all(torch.equal(found[name], weight) for name, weight in trainer.weights.items())
    model = load_adapted(tiny_model, trainer.config.out / "adapter")
    stored = read_tensors(tiny_model / "visual.safetensors")
    moved = {
        name
        for name, weight in model.transformer.visual_tensors().items()
        if not torch.equal(weight, stored[name].float())
    }
    assert {name.removesuffix(".lora_A.weight") + ".weight" for name in found if "lora_A" in name} == moved


def test_a_run_that_is_continued_is_the_same_run(adapting: Configure, tmp_path: Path) -> None:
    whole = Trainer(adapting(out=str(tmp_path / "whole")))
    whole.train()
    first = Trainer(adapting())
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(adapting())
    assert second.step == 3
    second.train()
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in kept(second).items())


def test_before_training_the_loss_is_that_of_the_model(adapting: Configure) -> None:
    adapted, plain = (Trainer(adapting(lora=lora, tasks={"text_to_image": 1.0})) for lora in ({"rank": 2}, None))
    assert adapted.train_step()["text_to_image/loss"] == plain.train_step()["text_to_image/loss"]


def test_captioning_trains_an_adapter_too(adapting: Configure) -> None:
    trainer = Trainer(adapting(tasks={"captioning": 1.0}))
    before = kept(trainer)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in kept(trainer).items())


def test_a_run_keeps_its_rank_and_its_model(adapting: Configure, tiny_model: Path, tmp_path: Path) -> None:
    trainer = Trainer(adapting())
    trainer.train_step()
    trainer.save()
    with pytest.raises(ConfigError, match='lora must stay .*"rank": 2.*got .*"rank": 4'):
        Trainer(adapting(lora={"rank": 4}))
    with pytest.raises(ConfigError, match="lora must stay .*got null"):
        Trainer(adapting(lora=None))
    product = trainer.product
    (trainer.config.out / "last" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no LoRA adapter at"):
        product.read(trainer.config.out / "last")


def test_an_adapter_needs_a_model(stage: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"\[lora\] adapts a model: set model.start_from to its folder"):
        from_dict(StageConfig, stage(lora={}))


def test_a_stage_says_that_it_trains_adapters(adapting: Configure) -> None:
    assert "trains adapters of rank 2 of it" in adapting().describe()
    assert "trains the visual expert" in adapting(lora=None).describe()


def test_a_model_is_made_without_lora(adapting: Configure, tiny_model: Path) -> None:
    trainer = Trainer(adapting(lora=None, steps=1))
    trainer.train()
    made = load_model(trainer.config.out / "model").transformer.visual_tensors()
    assert made.keys() == trainer.weights.keys()


def test_a_checkpoint_of_another_language_model_is_one_line(stage: Stage, tmp_path: Path) -> None:
    start(stage()).save()
    file = tmp_path / "run" / "last" / "config.json"
    write_json(file, {**read_json(file), "language_digest": "sha256:0"})
    write_state(file.parent, step=0, fixed={})
    with pytest.raises(CheckpointError, match="was trained on the LLM sha256:0"):
        start(stage())


def test_a_run_that_is_killed_at_its_end_still_makes_its_model(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(trainer: Trainer) -> None:
        assert (tmp_path / "run" / "model").is_dir()  # once the last checkpoint is there, nothing is left to do
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        start(stage(steps=3)).train()
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".model.0a1b2c3d")  # killed just before
    monkeypatch.undo()
    trainer = start(stage(steps=3))
    assert not list((tmp_path / "run").glob(".model*"))
    assert trainer.train()
    load_model(tmp_path / "run" / "model")


def test_what_is_stored_to_draw_with_is_the_average(stage: Stage, tmp_path: Path) -> None:
    trainer = start(stage(steps=4, optimizer=OPTIMIZERS["adamw"] | {"average": 0.9}))
    assert trainer.average is not None
    trainer.train()
    stored = read_tensors(tmp_path / "run" / "last" / "visual.safetensors")
    finished = read_tensors(tmp_path / "run" / "model" / "visual.safetensors")
    for name, value in trainer.average.values.items():
        assert torch.equal(stored[name], value)
        assert torch.equal(finished[name], value.half())
    assert any(not torch.equal(stored[name], weight) for name, weight in visual(trainer).items())
    load_model(tmp_path / "run" / "last")
