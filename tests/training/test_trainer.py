import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mars.checkpoint import load_model, read_json, read_tensors, write_json
from mars.config import from_dict
from mars.data.shards import CodedPicture, read_codes, write_codes
from mars.errors import CheckpointError, ConfigError, MarsError, TrainingError
from mars.model.language_tensors import tensors_digest
from mars.model.transformer import read_prefixes
from mars.sequence.layout import drawn_image
from mars.training import trainer as module
from mars.training.losses import text_to_image_loss
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

Stage = Callable[..., dict[str, Any]]
OPTIMIZERS = {
    "adamw": {"name": "adamw", "learning_rate": 3e-3, "warmup": 2},
    "muon": {"name": "muon", "learning_rate": 3e-3, "matrix_rate": 0.03, "warmup": 2, "decay": 4},
}


def start(table: dict[str, Any]) -> Trainer:
    return Trainer(from_dict(StageConfig, table))


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_step() for _ in range(count)]


def visual(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.transformer.visual_tensors().items()}


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "fp32"), ("muon", "bf16")])
def test_ten_steps_are_five_a_save_and_five_more_to_the_bit(
    stage: Stage, tmp_path: Path, optimizer: str, precision: str
) -> None:
    whole = start(stage(optimizer=OPTIMIZERS[optimizer], out=str(tmp_path / "whole"), precision=precision))
    wanted = steps(whole, 10)
    table = stage(optimizer=OPTIMIZERS[optimizer], precision=precision)
    first = start(table)
    found = steps(first, 5)
    first.save()
    resumed = start(table)
    assert resumed.step == 5
    found += steps(resumed, 5)
    assert found == wanted
    assert len({tuple(losses) for losses in wanted}) == 2  # captioning steps and drawing steps both occurred
    weights, right = visual(resumed), visual(whole)
    assert all(torch.equal(weights[name], right[name]) for name in right)
    for one, other in zip(resumed.optimizers, whole.optimizers, strict=True):
        left, also = one.state_dict()["state"], other.state_dict()["state"]
        assert left.keys() == also.keys()
        assert all(torch.equal(torch.as_tensor(left[i][k]), torch.as_tensor(also[i][k])) for i in also for k in also[i])


def test_products_in_bf16_give_nearly_the_same_losses_and_leave_all_weights_in_fp32(stage: Stage) -> None:
    plain, halves = start(stage(precision="fp32")), start(stage(precision="bf16"))
    wanted, found = steps(plain, 6), steps(halves, 6)
    assert found != wanted
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=0.1)
    assert {weight.dtype for weight in visual(halves).values()} == {torch.float32}
    states = (
        value for optimizer in halves.optimizers for state in optimizer.state.values() for value in state.values()
    )
    assert {torch.as_tensor(value).dtype for value in states} == {torch.float32}


def test_the_precision_is_bf16_only_where_that_is_fast(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "has_fast_bf16", lambda fast=fast: fast)
        assert start(stage(precision="auto")).dtype is dtype


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_language_model_does_not_change_by_a_bit(stage: Stage, optimizer: str) -> None:
    trainer = start(stage(optimizer=OPTIMIZERS[optimizer]))
    before, start_weights = tensors_digest(trainer.transformer.language_tensors()), visual(trainer)
    steps(trainer, 8)
    assert tensors_digest(trainer.transformer.language_tensors()) == before == trainer.info.language_digest
    unchanged = {name for name, weight in visual(trainer).items() if torch.equal(weight, start_weights[name])}
    assert unchanged == set()


def test_the_loss_of_a_few_pictures_falls(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, digest = read_codes(tiny_codes)
    write_codes(tmp_path / "few.parquet", coded[:3], tokenizer=digest)
    trainer = start(
        stage(
            data={"shards": [str(tmp_path / "few.parquet")], "kinds": {"name": 1.0}, "languages": {"en": 1.0}},
            optimizer=OPTIMIZERS["muon"] | {"warmup": 5, "decay": 10},
            guidance_dropout=0.0,
            steps=150,
        )
    )
    losses = steps(trainer, 150)
    floors = {"text_to_image/loss": 1.0, "captioning/loss": 1.5, "text_to_image/begin_image_loss": 1.0}
    for name, floor in floors.items():
        values = [one[name] for one in losses if name in one]
        assert values[0] > 3.5
        assert values[-1] < floor, name


def test_the_loss_of_top_rows_is_that_of_the_whole_picture_there(stage: Stage) -> None:
    trainer = start(stage(tasks={"text_to_image": 1.0}))
    steps(trainer, 3)
    transformer, (_, batch) = trainer.transformer, trainer.mix.draw(0)
    codes = torch.stack([example.codes for example in batch])
    prefixes = read_prefixes(transformer, [example.prompt for example in batch])
    segment, cache = drawn_image(codes, transformer.vocabulary), transformer.new_cache()
    assert segment.targets is not None
    cache.load(prefixes)
    with torch.no_grad():
        logits = transformer.visual_logits(transformer(segment, cache))
        targets = segment.targets - transformer.vocabulary.first_code
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        for rows in (1, codes.shape[1]):
            found = text_to_image_loss(transformer, codes[:, :rows], prefixes)
            assert torch.allclose(found, losses[:, : rows * codes.shape[2]].mean(), rtol=1e-5)
    assert not torch.allclose(losses[:, : codes.shape[2]].mean(), losses.mean(), rtol=1e-3)


def test_a_run_without_a_store_has_the_same_losses(stage: Stage, tmp_path: Path) -> None:
    stored, computed = start(stage()), start(stage(prefix_gib=0.0))
    for one, other in zip(steps(stored, 10), steps(computed, 10), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert computed.mix.context.prefixes.prefixes == {}
    assert stored.mix.context.prefixes.prefixes


def test_a_whole_run_leaves_a_model_a_log_and_samples(stage: Stage, tmp_path: Path) -> None:
    drawn: list[tuple[Path, tuple[str, ...]]] = []
    reports: list[int] = []

    def sampler(folder: Path, prompts: Sequence[str]) -> Image.Image:
        drawn.append((folder, tuple(prompts)))
        assert load_model(folder).info.name == "tiny"
        return Image.new("RGB", (8, 8))

    table = stage(steps=7, report_every=3, sample_every=4, save_every=5, sample_prompts=["a", "猫"])
    trainer = start(table)
    trainer.train(report=lambda step, values: reports.append(step), sampler=sampler)
    run = tmp_path / "run"
    assert reports == [3, 6]
    assert drawn == [(run / "last", ("a", "猫"))]
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000004.png", "latest.png"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[0]["tokens_per_second"] == pytest.approx(6 * lines[0]["images_per_second"])
    assert read_json(run / "last" / "state.json") == {
        "step": 7, "optimizer": "adamw", "seed": 0, "batch_size": 6, "pictures": 24,
        "image_tokenizer": trainer.loader.image_tokenizer,
    }  # fmt: skip
    model = load_model(run / "model")
    assert (model.info.grids, model.info.factor) == (((2, 3),), 16)
    for name, weight in trainer.transformer.visual_tensors().items():
        assert torch.equal(model.transformer.visual_tensors()[name], weight.half().float())
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "config.json", "image_tokenizer.json", "image_tokenizer.safetensors", "visual.safetensors",
    ]  # fmt: skip


def test_sampling_and_saving_change_nothing(stage: Stage, tmp_path: Path) -> None:
    table = stage(steps=6, sample_every=2, save_every=1, out=str(tmp_path / "watched"))
    watched, alone = start(table), start(stage(steps=6))
    watched.train(sampler=lambda folder, prompts: Image.new("RGB", (8, 8), tuple(torch.randint(255, (3,)).tolist())))
    steps(alone, 6)
    weights, right = visual(watched), visual(alone)
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_a_stage_continues_the_visual_expert_of_another_model(stage: Stage, tiny_model: Path) -> None:
    table = stage()
    table["model"]["start_from"] = str(tiny_model)
    stored = read_tensors(tiny_model / "visual.safetensors")
    assert all(torch.equal(weight, stored[name].float()) for name, weight in visual(start(table)).items())


def test_a_visual_expert_of_other_shapes_cannot_be_continued(stage: Stage, tiny_model: Path) -> None:
    table = stage()
    table["model"] = table["model"] | {"start_from": str(tiny_model)}
    table["model"]["semvie"]["visual_ffn"] = 44
    with pytest.raises(CheckpointError, match="other shapes than the configuration"):
        start(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 8}, "needs an image tokenizer of 8x8 pixels per code, got 16x16; use the image tokenizer that"),
        ({"model": {"num_codes": 32}}, "needs an image tokenizer of 32 codes, got 64; use the image tokenizer that"),
    ],
)
def test_a_visual_expert_of_another_image_tokenizer_cannot_be_continued(
    stage: Stage, tiny_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    table = read_json(tiny_model / "config.json")
    write_json(tmp_path / "other" / "config.json", table | change | {"model": table["model"] | change.get("model", {})})
    stage_table = stage()
    stage_table["model"] = stage_table["model"] | {"start_from": str(tmp_path / "other")}
    with pytest.raises(CheckpointError, match=f"other {message}"):
        start(stage_table)


def test_codes_of_another_tokenizer_are_refused(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, _ = read_codes(tiny_codes)
    write_codes(tmp_path / "other.parquet", coded, tokenizer="sha256:0000")
    with pytest.raises(CheckpointError, match="hold codes of image tokenizer sha256:0000.*encode the pictures again"):
        start(stage(data={"shards": [str(tmp_path / "other.parquet")]}))


def test_a_damaged_checkpoint_stops_a_resumed_run_with_one_line(stage: Stage, tmp_path: Path) -> None:
    table, last = stage(), tmp_path / "run" / "last"
    trainer = start(table)
    steps(trainer, 1)
    trainer.save()
    (last / "optimizer.safetensors").write_bytes((last / "optimizer.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        start(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["optimizer", "state"])
def test_a_checkpoint_of_another_kind_of_run_is_one_line(stage: Stage, tmp_path: Path, change: str) -> None:
    trainer = start(stage(optimizer=OPTIMIZERS["muon"]))
    steps(trainer, 1)
    trainer.save()
    if change == "state":
        write_json(tmp_path / "run" / "last" / "state.json", {})
    with pytest.raises(MarsError):
        start(stage(optimizer=OPTIMIZERS["adamw" if change == "optimizer" else "muon"]))


def test_pictures_of_different_sizes_are_one_line(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, digest = read_codes(tiny_codes)
    turned = [CodedPicture(record=item.record, codes=item.codes.T.copy()) for item in coded]
    write_codes(tmp_path / "turned.parquet", turned, tokenizer=digest)
    with pytest.raises(MarsError):
        steps(start(stage(data={"shards": [str(tiny_codes), str(tmp_path / "turned.parquet")]})), 5)


def test_a_killed_save_leaves_the_last_checkpoint(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 2)
    trainer.save()

    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_state", killed)
    steps(trainer, 1)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert start(table).step == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last"]
    shutil.rmtree(tmp_path / "run")
    assert start(table).step == 0


def test_a_save_that_was_killed_between_its_two_moves_is_found_again(stage: Stage, tmp_path: Path) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 2)
    trainer.save()
    (tmp_path / "run" / "last").rename(tmp_path / "run" / ".last.old")
    assert start(table).step == 2


def test_a_checkpoint_of_another_language_model_is_one_line(stage: Stage, tmp_path: Path) -> None:
    table = stage()
    start(table).save()
    file = tmp_path / "run" / "last" / "config.json"
    write_json(file, {**read_json(file), "language_digest": "sha256:0"})
    with pytest.raises(CheckpointError, match="was trained on the LLM sha256:0"):
        start(table)


def test_a_grid_that_the_grid_embedding_does_not_know_is_refused(stage: Stage) -> None:
    table = stage()
    semvie = {**table["model"].get("semvie", {}), "grid_embedding": True, "max_grid": 1}
    with pytest.raises(ConfigError, match="max_grid must be at least"):
        start({**table, "model": {**table["model"], "semvie": semvie}})


def test_a_step_that_is_sampled_is_saved_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, saved = start(stage(steps=4, save_every=2, sample_every=2)), []
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.step))
    monkeypatch.setattr(trainer, "_sample", lambda *_: None)
    trainer.train(sampler=lambda *_: Image.new("RGB", (1, 1)))
    assert saved == [2, 4]


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_a_number_that_is_not_finite_stops_the_run_and_the_last_state_stays(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    table = stage(captioning=0.0, save_every=1)
    trainer = start(table)

    def loss(*arguments: Any, **named: Any) -> torch.Tensor:
        found = text_to_image_loss(*arguments, **named)
        if trainer.step < 3:
            return found
        return found * torch.inf if broken == "loss" else found + (found * 0).sqrt()  # 0, with a slope of 0 * infinity

    monkeypatch.setattr(module, "text_to_image_loss", loss)
    message = f"{broken} must be finite, got (inf|nan) at step 3; continue from"
    with pytest.raises(TrainingError, match=message) as caught:
        trainer.train()
    assert str(tmp_path / "run" / "last") in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    table["optimizer"] = table["optimizer"] | {"learning_rate": 1e-3}
    resumed = start(table)
    assert resumed.step == 3
    weights, kept = visual(trainer), visual(resumed)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)  # what is in memory has not moved either
    steps(resumed, 2)


@pytest.mark.parametrize("name", ["seed", "batch_size", "image_tokenizer", "pictures", "optimizer"])
def test_a_run_cannot_be_continued_as_another(stage: Stage, tmp_path: Path, name: str) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 1)
    trainer.save()
    file = tmp_path / "run" / "last" / "state.json"
    state = read_json(file)
    write_json(file, state | {name: "muon" if name == "optimizer" else 3})
    with pytest.raises(ConfigError, match=f"{name} must stay (3|muon), .* start anew with --set out=DIR") as caught:
        start(table)
    assert "\n" not in str(caught.value)
    write_json(file, {"step": 1})  # as older versions wrote it
    assert start(table).step == 1


def test_a_run_may_be_prolonged_and_its_rates_and_shares_changed(stage: Stage) -> None:
    trainer = start(stage())
    steps(trainer, 2)
    trainer.save()
    changes: dict[str, Any] = {"steps": 20, "captioning": 0.5, "guidance_dropout": 0.0, "save_every": 3, "name": "b"}
    resumed = start(stage(**changes, optimizer=OPTIMIZERS["adamw"] | {"learning_rate": 1e-4, "decay": 5}))
    assert resumed.step == 2
    assert resumed.optimizers[0].param_groups[0]["peak"] == 1e-4
    steps(resumed, 1)


def test_a_run_over_other_pictures_is_another_run(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    start(stage()).save()
    coded, digest = read_codes(tiny_codes)
    write_codes(tmp_path / "few.parquet", coded[:9], tokenizer=digest)
    with pytest.raises(ConfigError, match="pictures must stay 24, .* got 9"):
        start(stage(data={"shards": [str(tmp_path / "few.parquet")]}))
    with pytest.raises(ConfigError, match="batch_size must stay 6, .* got 5"):
        start(stage(batch_size=5))
    with pytest.raises(ConfigError, match="seed must stay 0, .* got 1"):
        start(stage(seed=1))
