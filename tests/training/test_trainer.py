import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mars.checkpoint import load_model, read_json
from mars.config import from_dict
from mars.data.shards import CodedPicture, read_codes, write_codes
from mars.errors import CheckpointError, ConfigError, TrainingError
from mars.model.language_tensors import tensors_digest
from mars.model.transformer import read_prefixes
from mars.sequence.layout import drawn_image
from mars.training import trainer as module
from mars.training.losses import text_to_image_loss
from mars.training.stages import StageConfig
from mars.training.tasks import Drawing, TextToImage
from mars.training.trainer import Trainer
from tests.training.conftest import OPTIMIZERS, Stage, slots, start, steps, visual


@pytest.mark.parametrize("task", ["text_to_image", "captioning"])
def test_a_step_in_parts_is_the_step(stage: Stage, task: str) -> None:
    """Captions have different lengths, so that parts must count as their ids do."""
    whole, parts = (start(stage(tasks={task: 1.0}, accumulate=count)) for count in (1, 3))
    one, other = steps(whole, 1)[0], steps(parts, 1)[0]
    one.pop("captioning/padding", None)  # parts have less of it
    assert one == pytest.approx({name: other[name] for name in one}, rel=1e-5)
    for name, weight in whole.weights.items():
        assert (weight.grad is None) == (parts.weights[name].grad is None)
        if weight.grad is not None:
            torch.testing.assert_close(parts.weights[name].grad, weight.grad, rtol=1e-3, atol=1e-6)


def test_more_parts_than_pictures_are_one_line(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least accumulate x processes, 7 x 1, got 6"):
        start(stage(accumulate=7))


def test_products_in_bf16_give_nearly_the_same_losses_and_leave_all_weights_in_fp32(stage: Stage) -> None:
    plain, halves = start(stage(precision="fp32")), start(stage(precision="bf16"))
    wanted, found = steps(plain, 6), steps(halves, 6)
    assert found != wanted
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=0.1)
    assert {weight.dtype for weight in visual(halves).values()} == {torch.float32}
    assert {value.dtype for value in slots(halves).values()} == {torch.float32}


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_frozen_matrices_are_kept_in_bf16_where_products_are_and_no_loss_changes(
    stage: Stage, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    table = stage(precision="bf16", lora=lora)
    if lora:
        table["model"] = {"start_from": str(tiny_model)}
    halves = start(table)
    frozen = [
        name
        for name, part in halves.transformer.named_modules()
        if isinstance(part, nn.Linear) and part.weight.dtype is torch.bfloat16
    ]
    assert len(frozen) == 3 * 7 + (2 * 7 + 2 if lora else 0)
    assert {weight.dtype for weight in halves.weights.values()} == {torch.float32}
    tables = halves.transformer.text_table, halves.transformer.language_embedding.weight
    assert [table.dtype for table in tables] == [torch.bfloat16, torch.float32]  # the head, and what ids look up
    found = steps(halves, 6)
    halves.save()
    again = start(table)
    monkeypatch.setattr(module, "halve_frozen", lambda _: None)
    whole = start(table | {"out": f"{table['out']}-whole"})
    assert found == steps(whole, 6)
    assert steps(again, 4) == steps(whole, 4)
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in again.weights.items())


def test_the_precision_is_bf16_only_where_that_is_fast(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device, fast=fast: fast)
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

    table = stage(
        steps=7, report_every=3, sample_every=4, save_every=5, sample_prompts=["a", "猫"], tasks={"text_to_image": 1}
    )
    trainer = start(table)
    trainer.train(report=lambda step, values: reports.append(step), sampler=sampler)
    run = tmp_path / "run"
    assert reports == [3, 6]
    assert drawn == [(run / "last", ("a", "猫"))]
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000004.png", "latest.png"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[0]["tokens_per_second"] == pytest.approx(6 * lines[0]["images_per_second"])
    assert 0 < lines[0]["mfu"] < 1
    assert lines[0]["memory_gib"] > 0.1
    assert lines[0]["text_to_image/logit_norm"] > 0
    state = read_json(run / "last" / "state.json")
    assert state.pop("progress")["score"] > 0
    assert state.pop("files").keys() == {path.name for path in (run / "last").iterdir()} - {"state.json"}
    assert state == {"step": 7, "fixed": trainer.fixed}
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


def test_codes_of_another_tokenizer_are_refused(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, _ = read_codes(tiny_codes)
    write_codes(tmp_path / "other.parquet", coded, tokenizer="sha256:0000")
    with pytest.raises(CheckpointError, match="hold codes of image tokenizer sha256:0000.*encode the pictures again"):
        start(stage(data={"shards": [str(tmp_path / "other.parquet")]}))


def test_pictures_of_several_sizes_are_learned_together(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, digest = read_codes(tiny_codes)
    turned = [CodedPicture(record=item.record, codes=item.codes.T.copy()) for item in coded]
    write_codes(tmp_path / "turned.parquet", turned, tokenizer=digest)
    trainer = start(stage(data={"shards": [str(tiny_codes), str(tmp_path / "turned.parquet")]}))
    shapes = [{tuple(one.codes.shape) for one in trainer.mix.draw(step)[1]} for step in range(12)]
    assert {len(found) for found in shapes} == {1}  # a batch has one
    assert set.union(*shapes) == {(2, 3), (3, 2)} == set(trainer.info.grids)
    steps(trainer, 4)


def test_a_step_that_is_sampled_is_saved_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, saved = start(stage(steps=4, save_every=2, sample_every=2)), []
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.step))
    monkeypatch.setattr(trainer, "_sample", lambda *_: None)
    trainer.train(sampler=lambda *_: Image.new("RGB", (1, 1)))
    assert saved == [2, 4]


def spoil(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, *, broken: str, steps: range) -> None:
    """Makes the loss of some steps infinite, or only its gradient."""

    def losses(task: TextToImage, batch: Sequence[Drawing]) -> dict[str, torch.Tensor]:
        found = learned(task, batch)
        if trainer.step not in steps:
            return found
        total = found["total"]
        endless = total * torch.inf if broken == "loss" else total + (total * 0).sqrt()  # 0, of slope 0 * infinity
        return found | {"total": endless}

    learned = TextToImage.losses
    monkeypatch.setattr(TextToImage, "losses", losses)


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_a_step_that_is_not_finite_moves_nothing_and_the_run_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    table = stage(tasks={"text_to_image": 1.0}, optimizer=OPTIMIZERS["muon"] | {"average": 0.9})
    said: list[str] = []
    trainer = Trainer(from_dict(StageConfig, table), notify=said.append)
    spoil(monkeypatch, trainer, broken=broken, steps=range(2, 4))
    values = steps(trainer, 2)
    before, held = visual(trainer), {name: value.clone() for name, value in slots(trainer).items()}
    values += steps(trainer, 2)
    after = visual(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(slots(trainer)[name], value) for name, value in held.items())
    assert [line["skipped"] for line in values] == [0, 0, 1, 1]
    assert sum("the step is skipped" in line for line in said) == 2
    trainer.save()
    values += steps(trainer, 2)
    resumed = start(table)
    assert resumed.skipped == 2
    assert steps(resumed, 2) == values[-2:]
    assert resumed.skipped == 0


@pytest.mark.parametrize("broken", ["loss", "gradient_norm"])
def test_a_run_that_stays_not_finite_ends_with_its_batch_saved(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    table = stage(tasks={"text_to_image": 1.0}, save_every=2, max_skipped=3)
    trainer = start(table)
    spoil(monkeypatch, trainer, broken=broken, steps=range(3, 100))
    name = "text_to_image/total" if broken == "loss" else "gradient_norm"
    message = rf"{name} must be finite, got (inf|nan) at step 5, and so were 3 steps in a row; the batch is in .*step"
    with pytest.raises(TrainingError, match=message) as caught:
        trainer.train()
    assert f"continue from {tmp_path / 'run' / 'last'} with a lower rate" in str(caught.value)
    assert "\n" not in str(caught.value)
    batch = json.loads((tmp_path / "run" / "skipped-step-000005.json").read_text("utf-8"))
    assert (batch["step"], batch["task"], len(batch["examples"])) == (5, "text_to_image", 6)
    assert batch["examples"][0]["codes"] == trainer.mix.draw(5)[1][0].codes.tolist()
    monkeypatch.undo()
    resumed = start(table)
    assert resumed.step == 4
    weights, kept = visual(trainer), visual(resumed)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)  # nothing has moved in memory either
    steps(resumed, 2)


def test_held_out_pictures_are_never_learned_and_measuring_them_changes_nothing(stage: Stage, tmp_path: Path) -> None:
    table = stage(optimizer=OPTIMIZERS["adamw"] | {"average": 0.5})
    wanted = steps(start(table), 6)
    table["data"] |= {"held_out": ["concept"]}
    trainer = start(table)
    found = steps(trainer, 3)
    before = visual(trainer)
    assert trainer.held_out_loss()
    assert all(torch.equal(visual(trainer)[name], weight) for name, weight in before.items())
    assert found + steps(trainer, 3) == wanted
    held_out = trainer.mix.context.codes.held_out
    assert held_out is not None
    assert len(held_out) == 4


def test_activations_that_are_computed_again_give_the_same_gradients(stage: Stage) -> None:
    plain, again = start(stage()), start(stage(recompute=True))
    assert steps(plain, 6) == steps(again, 6)
    weights, right = visual(again), visual(plain)
    assert all(torch.equal(weights[name], right[name]) for name in right)
