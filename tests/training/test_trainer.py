import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from mars.training.checkpoints import Checkpoints
from mars.training.losses import text_to_image_loss
from mars.training.optim import optimizer_tensors
from mars.training.runstate import write_state
from mars.training.stages import StageConfig
from mars.training.tasks import Drawing, TextToImage
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


def toml(table: dict[str, Any], section: str = "") -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    tables = [(f"{section}{key}", value) for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines, *(f"[{name}]\n{toml(value, f'{name}.')}" for name, value in tables)])


def slots(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What the optimizers remember."""
    return optimizer_tensors(trainer.optimizers, {id(weight): name for name, weight in trainer.weights.items()})


def visual(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.transformer.visual_tensors().items()}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {}),
        ("muon", {}),
        ("muon", {"precision": "bf16"}),
        ("adamw", {"average": 0.9, "accumulate": 2, "z_loss": 1e-3}),
        ("muon", {"average": 0.9, "recompute": True, "tasks": {"top_rows": 1.0, "captioning": 1.0}, "top_rows": 1}),
    ],
    ids=str,
)
def test_ten_steps_are_five_a_save_and_five_more_to_the_bit(
    stage: Stage, tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    moved = OPTIMIZERS[optimizer] | {"average": options.pop("average", None)}
    whole = start(stage(optimizer=moved, out=str(tmp_path / "whole"), **options))
    wanted = steps(whole, 10)
    table = stage(optimizer=moved, **options)
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
    left, also = slots(resumed), slots(whole)
    assert left.keys() == also.keys()
    assert all(torch.equal(left[name], also[name]) for name in also)
    if resumed.average is not None and whole.average is not None:
        assert all(torch.equal(resumed.average.values[name], value) for name, value in whole.average.values.items())


def test_a_log_of_a_resumed_run_has_the_lines_of_one_that_was_not_interrupted(stage: Stage, tmp_path: Path) -> None:
    def lines(name: str) -> list[dict[str, float]]:
        text = (tmp_path / name / "log.jsonl").read_text("utf-8")
        timed = ("time", "images_per_second", "tokens_per_second", "mfu", "memory_gib")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()]

    table = stage(report_every=3, save_every=4, steps=12, out=str(tmp_path / "whole"))
    assert start(table).train()
    broken = table | {"out": str(tmp_path / "broken")}
    seen: list[int] = []
    assert not start(broken).train(stopping=lambda: len(seen.append(0) or seen) == 5)  # type: ignore[func-returns-value]
    assert start(broken).step == 5
    assert start(broken).train()
    assert lines("broken") == lines("whole")
    assert [line["step"] for line in lines("whole")] == [3, 6, 9, 12]


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
    assert state == {
        "step": 7, "optimizer": "adamw", "seed": 0, "batch_size": 6, "pictures": 24,
        "image_tokenizer": trainer.mix.context.loader.image_tokenizer, "lora": "none",
        "upscale": "none",
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


def test_codes_of_another_tokenizer_are_refused(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, _ = read_codes(tiny_codes)
    write_codes(tmp_path / "other.parquet", coded, tokenizer="sha256:0000")
    with pytest.raises(CheckpointError, match="hold codes of image tokenizer sha256:0000.*encode the pictures again"):
        start(stage(data={"shards": [str(tmp_path / "other.parquet")]}))


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_continued(stage: Stage, tmp_path: Path) -> None:
    table = stage(tasks={"text_to_image": 0.7, "captioning": 0.3}, optimizer=OPTIMIZERS["muon"])
    trainer = start(table)
    for _ in range(2):
        steps(trainer, 2)
        trainer.save()
    wanted = steps(trainer, 1)
    path = tmp_path / "run" / "last" / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit
    path.write_bytes(content)
    said: list[str] = []
    resumed = Trainer(from_dict(StageConfig, table), notify=said.append)
    (line,) = [line for line in said if "checkpoint" in line]
    assert "step-000004 cannot be used, the one before it is tried" in line
    assert "training.safetensors is damaged" in line
    assert "\n" not in line
    assert resumed.step == 2
    assert (tmp_path / "run" / "last").resolve().name == "step-000002"
    assert steps(resumed, 3)[2:] == wanted


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(stage: Stage, tmp_path: Path) -> None:
    trainer = start(stage())
    steps(trainer, 1)
    trainer.save()
    (tmp_path / "run" / "last" / "visual.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*visual\.safetensors is missing") as caught:
        start(stage())
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


def test_pictures_of_several_sizes_are_learned_together(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    coded, digest = read_codes(tiny_codes)
    turned = [CodedPicture(record=item.record, codes=item.codes.T.copy()) for item in coded]
    write_codes(tmp_path / "turned.parquet", turned, tokenizer=digest)
    trainer = start(stage(data={"shards": [str(tiny_codes), str(tmp_path / "turned.parquet")]}))
    shapes = [{tuple(one.codes.shape) for one in trainer.mix.draw(step)[1]} for step in range(12)]
    assert {len(found) for found in shapes} == {1}  # a batch has one
    assert set.union(*shapes) == {(2, 3), (3, 2)} == set(trainer.info.grids)
    steps(trainer, 4)


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
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    shutil.rmtree(tmp_path / "run")
    assert start(table).step == 0


def test_a_save_that_was_killed_between_its_two_moves_is_found_again(stage: Stage, tmp_path: Path) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 2)
    trainer.save()
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000002").rename(folder / ".step-000002.old")
    (folder / ".step-000002.0a1b2c3d").mkdir()
    assert start(table).step == 2
    assert [path.name for path in folder.iterdir()] == ["step-000002"]


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
    shutil.rmtree(tmp_path / "run" / "model")
    monkeypatch.undo()
    assert start(stage(steps=3)).train()
    load_model(tmp_path / "run" / "model")


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


def test_an_average_may_be_begun_or_given_up_in_a_run_that_goes_on(stage: Stage) -> None:
    averaged = OPTIMIZERS["adamw"] | {"average": 0.9}
    trainer = start(stage(optimizer=averaged))
    steps(trainer, 2)
    trainer.save()
    plain = start(stage())
    weights, right = visual(plain), visual(trainer)
    assert all(torch.equal(weights[name], right[name]) for name in right)
    steps(plain, 1)
    plain.save()
    again = start(stage(optimizer=averaged))
    assert again.average is not None
    assert all(torch.equal(value, visual(plain)[name]) for name, value in again.average.values.items())


def test_the_best_checkpoint_is_the_one_with_the_lowest_held_out_loss(stage: Stage, tmp_path: Path) -> None:
    table = stage(tasks={"text_to_image": 1.0}, keep=1, optimizer=OPTIMIZERS["muon"])
    table["data"] |= {"held_out": ["concept", "picture"]}
    trainer = start(table)
    scores = []
    for _ in range(3):
        steps(trainer, 1)
        trainer.save()
        scores.append(read_json(tmp_path / "run" / "last" / "state.json")["progress"]["score"])
    assert trainer.held_out_loss() == scores[-1]  # not a matter of chance
    for weight in trainer.weights.values():
        weight.data.normal_(0, 3)
    trainer.step = 4
    trainer.save()
    best = 1 + scores.index(min(scores))
    run = tmp_path / "run"
    assert ((run / "last").readlink().name, (run / "best").readlink().name) == ("step-000004", f"step-00000{best}")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000004", f"step-00000{best}"}
    load_model(run / "best")


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
    assert trainer.mix.context.held_out is not None
    assert len(trainer.mix.context.held_out) == 4


def test_activations_that_are_computed_again_give_the_same_gradients(stage: Stage) -> None:
    plain, again = start(stage()), start(stage(recompute=True))
    assert steps(plain, 6) == steps(again, 6)
    weights, right = visual(again), visual(plain)
    assert all(torch.equal(weights[name], right[name]) for name in right)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(stage: Stage, tmp_path: Path) -> None:
    trainer = start(stage())
    steps(trainer, 2)
    trainer.save()
    steps(trainer, 1)
    with full_disk(20_000), pytest.raises(CheckpointError, match=r"cannot write .*step-000003") as caught:
        trainer.save()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert start(stage()).step == 2
    trainer.save()
    assert start(stage()).step == 3


@pytest.mark.parametrize("name", ["seed", "batch_size", "image_tokenizer", "pictures", "optimizer"])
def test_a_run_cannot_be_continued_as_another(stage: Stage, tmp_path: Path, name: str) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 1)
    trainer.save()
    file = tmp_path / "run" / "last" / "state.json"
    write_json(file, read_json(file) | {name: "muon" if name == "optimizer" else 3})
    with pytest.raises(ConfigError, match=f"{name} must stay (3|muon), .* start anew with --set out=DIR") as caught:
        start(table)
    assert "\n" not in str(caught.value)


def test_a_run_may_be_prolonged_and_its_rates_and_shares_changed(stage: Stage) -> None:
    trainer = start(stage())
    steps(trainer, 2)
    trainer.save()
    changes: dict[str, Any] = {"steps": 20, "guidance_dropout": 0.0, "save_every": 3, "name": "b"}
    changes["tasks"] = {"captioning": 1.0}
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


KILLED = """
import sys, tomllib
from pathlib import Path
from mars.config import load_config
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

trainer = Trainer(load_config(StageConfig, Path(sys.argv[1])), notify=print)
print("step", trainer.step, flush=True)
trainer.train(report=lambda step, values: print("step", step, flush=True))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a minute and a half on an idle machine, twenty-one starts of Python among it
def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_one_that_was_not(
    stage: Stage, tmp_path: Path
) -> None:
    """Killed at any moment by SIGKILL: between steps, inside one, while a checkpoint is written."""
    table = stage(
        steps=150, save_every=3, report_every=1, optimizer=OPTIMIZERS["muon"] | {"average": 0.9}, threads=1, keep=1
    )
    whole = Trainer(from_dict(StageConfig, table | {"out": str(tmp_path / "whole")}))
    config = tmp_path / "killed.toml"
    config.write_text(toml(table), "utf-8")
    moments, kills, reached = random.Random(0), 0, 0
    while True:
        command = [sys.executable, "-W", "error", "-c", KILLED, str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if kills < 20:
                for _ in range(moments.randrange(12)):  # so many lines, most of them one a step
                    assert process.stdout.readline()
                time.sleep(moments.uniform(0.0, 0.05))  # and somewhere in the step after
                process.kill()
                kills += 1
            process.stdout.read()
        after = Checkpoints(tmp_path / "run", keep=1, process=whole.process).steps()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert max(after, default=0) >= reached
        reached = max(after, default=0)
    assert kills == 20
    assert reached > 0
    whole.train()
    wanted, found = (read_tensors(tmp_path / name / "last" / "training.safetensors") for name in ("whole", "run"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    logs = [(tmp_path / name / "log.jsonl").read_text("utf-8").splitlines() for name in ("whole", "run")]
    losses = [[{k: v for k, v in json.loads(line).items() if "/" in k} for line in lines] for lines in logs]
    assert losses[0] == losses[1]
    made = [(tmp_path / name / "model" / "visual.safetensors").read_bytes() for name in ("whole", "run")]
    assert made[0] == made[1]
