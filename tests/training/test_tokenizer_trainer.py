import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mars.checkpoint import codes_digest, load_image_tokenizer, read_json, write_json
from mars.config import from_dict
from mars.data.shards import Picture, read_pictures, write_pictures
from mars.errors import CheckpointError, ConfigError, DataError, TrainingError
from mars.image_tokenizer.losses import discriminator_loss
from mars.training import tokenizer_trainer as module
from mars.training.tokenizer_trainer import (
    TokenizerTrainer,
    TokenizerTrainingConfig,
    evaluate_tokenizer,
    load_pictures,
    reconstruction_grid,
)


@pytest.fixture
def table(tmp_path: Path, tiny_pictures: Path) -> dict[str, Any]:
    return {
        "data": [str(tiny_pictures)], "out": str(tmp_path / "run"), "steps": 10, "batch_size": 4, "crop": 16,
        "quantize_from": 3, "adversarial_from": 6, "perceptual_weight": 0.0, "warmup": 2, "full_from": 0.7,
        "tokenizer": {
            "num_codes": 16, "code_width": 8, "channels": [32], "patch": 16, "blocks_per_level": 1,
        },
    }  # fmt: skip


def config_of(table: dict[str, Any], **changes: Any) -> TokenizerTrainingConfig:
    return from_dict(TokenizerTrainingConfig, table | changes)


def steps(trainer: TokenizerTrainer, count: int, pictures: torch.Tensor) -> list[dict[str, float]]:
    losses = []
    for _ in range(count):
        losses.append(trainer.train_step(pictures))
        trainer.step += 1
    return losses


def state(trainer: TokenizerTrainer) -> dict[str, torch.Tensor]:
    found = {f"tokenizer.{name}": tensor for name, tensor in trainer.tokenizer.state_dict().items()}
    found |= {f"judge.{name}": tensor for name, tensor in trainer.discriminator.state_dict().items()}
    return found | trainer.codebook.state()


@pytest.mark.parametrize("pause", [2, 5, 8], ids=["plain", "quantizing", "adversary"])
def test_ten_steps_are_some_a_save_and_the_rest_to_the_bit(table: dict[str, Any], tmp_path: Path, pause: int) -> None:
    config = config_of(table)
    pictures, _ = load_pictures(config.data)
    whole = TokenizerTrainer(replace(config, out=tmp_path / "whole"))
    wanted = steps(whole, 10, pictures)
    first = TokenizerTrainer(config)
    found = steps(first, pause, pictures)
    first.save()
    torch.manual_seed(99)
    resumed = TokenizerTrainer(config)
    assert resumed.step == pause
    found += steps(resumed, 10 - pause, pictures)
    assert found == wanted
    weights, right = state(resumed), state(whole)
    assert all(torch.equal(weights[name], right[name]) for name in right)


def test_a_few_pictures_are_learnt_by_heart(table: dict[str, Any]) -> None:
    trainer = TokenizerTrainer(
        config_of(table, steps=80, quantize_from=50, adversarial_from=1000, learning_rate=1e-2, full_from=0.0, crop=32)
    )
    pictures, _ = load_pictures(trainer.config.data)
    losses = steps(trainer, 80, pictures[:1, :, :, :32])
    assert losses[49]["loss"] < 0.3 * losses[0]["loss"]
    assert losses[-1]["loss"] < 0.3 * losses[0]["loss"]
    assert evaluate_tokenizer(trainer.tokenizer, pictures[:1, :, :, :32])["psnr"] > 16


def test_bf16_learns_as_fp32_does_and_keeps_its_weights_whole(table: dict[str, Any]) -> None:
    table = table | {"adversarial_from": None}
    pictures, _ = load_pictures(config_of(table).data)
    trainers = [TokenizerTrainer(config_of(table, precision=name)) for name in ("fp32", "bf16")]
    exact, half = ([losses["loss"] for losses in steps(trainer, 8, pictures)] for trainer in trainers)
    assert half[:3] == pytest.approx(exact[:3], rel=0.03)  # codes are chosen from the fourth on
    assert half != exact
    assert {tensor.dtype for tensor in trainers[1].tokenizer.parameters()} == {torch.float32}


def test_a_whole_run_leaves_a_tokenizer_a_report_and_a_grid(table: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(table, steps=25, report_every=10)
    _, held_out = load_pictures(config.data)
    said: list[str] = []
    report = TokenizerTrainer(config).train(said.append)
    run = tmp_path / "run"
    assert read_json(run / "report.json") == {**report, "held_out_pictures": 8, "steps": 25}
    with Image.open(run / "reconstructions.png") as grid:
        assert grid.size == (8 * 48, 2 * 32)
    assert any("step 25/25" in line for line in said)
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == {
        "last", "log.jsonl", "reconstructions.png", "report.json",
    }  # fmt: skip
    tokenizer, _ = load_image_tokenizer(run / "last")
    assert evaluate_tokenizer(tokenizer, held_out) == pytest.approx(report)


def test_a_decoder_can_learn_codes_of_less_entropy(table: dict[str, Any], tmp_path: Path) -> None:
    first = TokenizerTrainer(config_of(table))
    pictures, held_out = load_pictures(first.config.data)
    steps(first, 5, pictures)
    book = first.tokenizer.quantizer.embedding.weight.detach()
    book.copy_(first.tokenizer.to_vectors(pictures[:16].float() / 255).detach().permute(0, 2, 3, 1).flatten(0, 2)[:16])
    first.save()
    before = evaluate_tokenizer(first.tokenizer, held_out)
    config = config_of(
        table,
        decoder_only=True,
        code_rate=1000.0,
        start_from=str(tmp_path / "run" / "last"),
        out=str(tmp_path / "decoder"),
        steps=2,
    )
    report = TokenizerTrainer(config).train(lambda line: None)
    assert report["perplexity"] < 0.9 * before["perplexity"]
    tokenizer, _ = load_image_tokenizer(tmp_path / "decoder" / "last")
    assert evaluate_tokenizer(tokenizer, held_out)["perplexity"] == pytest.approx(report["perplexity"])
    with pytest.raises(ConfigError, match="code_rate must be 0, or greater together with decoder_only"):
        config_of(table, code_rate=1.0)


def test_training_the_decoder_alone_keeps_every_code(table: dict[str, Any], tmp_path: Path) -> None:
    first = TokenizerTrainer(config_of(table))
    pictures, _ = load_pictures(first.config.data)
    steps(first, 5, pictures)
    first.save()
    config = config_of(
        table, decoder_only=True, start_from=str(tmp_path / "run" / "last"), out=str(tmp_path / "decoder")
    )
    second = TokenizerTrainer(config)
    steps(second, 6, pictures)
    assert codes_digest(second.tokenizer) == codes_digest(first.tokenizer)
    images = pictures.float() / 255
    assert torch.equal(second.tokenizer.encode(images), first.tokenizer.encode(images))
    assert not torch.equal(second.tokenizer.decoder.last_weight, first.tokenizer.decoder.last_weight)


def test_the_rate_warms_up_and_falls_to_a_fiftieth(table: dict[str, Any]) -> None:
    trainer = TokenizerTrainer(config_of(table, steps=100, warmup=10))
    rates = []
    for trainer.step in range(100):
        rates.append(trainer._rate())
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[50] == pytest.approx(0.51, abs=0.01)
    assert 0.02 <= rates[-1] < 0.03
    assert max(rates) <= 1


def test_crops_come_first_and_whole_pictures_later(table: dict[str, Any]) -> None:
    trainer = TokenizerTrainer(config_of(table, batch_size=8))
    pictures, _ = load_pictures(trainer.config.data)
    assert trainer._batch(pictures).shape == (8, 3, 16, 16)
    trainer.step = 7
    assert trainer._batch(pictures).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("side", "offsets"), [(64, 8), (16, 4), (2, 1)])
def test_the_perceptual_loss_looks_from_every_offset_at_the_same_part_of_both(
    table: dict[str, Any], side: int, offsets: int
) -> None:
    trainer = TokenizerTrainer(config_of(table, perceptual_share=0.5))
    images = torch.arange(4 * 3 * side * side).reshape(4, 3, side, side).float()
    seen = set()
    for _ in range(60 * offsets):
        rebuilt, true = trainer._shifted(images + 0.5, images)
        assert torch.equal(rebuilt, true + 0.5)
        assert len(true) == 2
        assert float(true[-1, -1, -1, -1]) == float(images[1, -1, -1, -1])  # cut off at the top and on the left alone
        seen.add((side - true.shape[2], side - true.shape[3]))
    assert seen == {(top, left) for top in range(offsets) for left in range(offsets)}


def test_held_out_pictures_are_never_trained_on(tiny_pictures: Path) -> None:
    train, held_out = load_pictures([tiny_pictures])
    assert (len(train), len(held_out)) == (24, 8)
    for picture, pixels in zip(list(read_pictures(tiny_pictures))[24:], held_out, strict=True):
        wanted = np.asarray(Image.open(io.BytesIO(picture.content)))
        assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(wanted.copy()))
        assert not bool((train == pixels).flatten(1).all(dim=1).any())


def test_a_set_that_cannot_be_trained_on_is_one_line(tmp_path: Path, tiny_pictures: Path) -> None:
    pictures = list(read_pictures(tiny_pictures))
    write_pictures(tmp_path / "train.tar", pictures[:4])
    with pytest.raises(DataError, match="to train on and to hold out, got 4 and 0"):
        load_pictures([tmp_path / "train.tar"])
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    small = Picture(record=replace(pictures[0].record, key="x"), content=png.getvalue())
    write_pictures(tmp_path / "sizes.tar", [*pictures, small])
    with pytest.raises(DataError, match="must share one size"):
        load_pictures([tmp_path / "sizes.tar"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate must be greater than 0"),
        ({"learning_rate": math.inf}, "learning_rate must be greater than 0 and finite"),
        ({"steps": 0}, "steps must be greater than 0"),
        ({"quantize_from": -1}, "quantize_from must be at least 0"),
        ({"crop": 20}, "crop must be a multiple of 16, got 20"),
        ({"decoder_only": True}, "decoder_only needs start_from"),
        ({"stepz": 3}, "unknown key stepz; did you mean steps"),
    ],
)
def test_a_wrong_configuration_is_one_line(table: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(table, **changes)


@pytest.mark.parametrize("name", ["l1_weight", "l2_weight", "commitment", "perceptual_weight", "adversarial_weight"])
def test_a_negative_weight_is_one_line(table: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config_of(table, **{name: -1})


def test_a_grid_shows_pictures_above_their_reconstructions(table: dict[str, Any]) -> None:
    trainer = TokenizerTrainer(config_of(table))
    pictures, _ = load_pictures(trainer.config.data)
    grid = reconstruction_grid(trainer.tokenizer, pictures, columns=3)
    assert grid.size == (3 * 48, 4 * 32)
    assert torch.equal(torch.from_numpy(np.asarray(grid)[:32, :48].copy()), pictures[0].permute(1, 2, 0))


def test_a_killed_save_leaves_the_last_state_whole(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, last = config_of(table), tmp_path / "run" / "last"
    trainer = TokenizerTrainer(config)
    pictures, _ = load_pictures(config.data)
    steps(trainer, 2, pictures)
    trainer.save()
    kept = {path.name: path.read_bytes() for path in last.iterdir()}
    steps(trainer, 1, pictures)

    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    for name in ("save_image_tokenizer", "save_tensors", "write_state"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                trainer.save()
        assert {path.name: path.read_bytes() for path in last.iterdir()} == kept
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["last"]
    last.rename(last.with_name(".last.old"))  # killed between the two moves
    assert TokenizerTrainer(config).step == 2


@pytest.mark.parametrize("broken", ["loss", "gradient_norm", "the discriminator's loss"])
def test_a_number_that_is_not_finite_stops_the_run_and_the_last_state_stays(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    trainer = TokenizerTrainer(config_of(table, save_every=1, adversarial_from=0))
    images = trainer.tokenizer.to_images

    def rebuilt(vectors: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = images(vectors)
        if trainer.step < 4 or broken.startswith("the"):
            return found
        return found * torch.nan if broken == "loss" else found + (found * 0).sqrt()  # 0, of infinite slope

    monkeypatch.setattr(trainer.tokenizer, "to_images", rebuilt)

    def judged(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return discriminator_loss(real, fake) * (1 if trainer.step < 4 else torch.inf)

    if broken.startswith("the"):
        monkeypatch.setattr(module, "discriminator_loss", judged)
    if broken == "gradient_norm":
        monkeypatch.setattr(trainer, "_adversarial", lambda reconstruction, *_: reconstruction * 0)
    elif broken == "loss":
        monkeypatch.setattr(trainer, "_adversarial", lambda reconstruction, *_: reconstruction)
    message = f"{broken} must be finite, got (inf|nan) at step 4; continue from"
    with pytest.raises(TrainingError, match=message) as caught:
        trainer.train(lambda _: None)
    assert str(tmp_path / "run" / "last") in str(caught.value)
    resumed = TokenizerTrainer(config_of(table, adversarial_from=0, learning_rate=1e-4))
    assert resumed.step == 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state(resumed).values())
    weights, right = dict(trainer.tokenizer.named_parameters()), dict(resumed.tokenizer.named_parameters())
    assert all(torch.equal(weights[name], right[name]) for name in right if not name.startswith("quantizer"))


def test_a_state_of_another_run_is_one_line(table: dict[str, Any], tmp_path: Path) -> None:
    TokenizerTrainer(config_of(table)).save()
    other = tmp_path / "other.tar"
    write_pictures(other, list(read_pictures(Path(table["data"][0])))[1:])
    for changes in ({"seed": 1}, {"batch_size": 3}, {"crop": 32}, {"adversarial_from": 7}, {"data": [str(other)]}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} must stay"):
            TokenizerTrainer(config_of(table, **changes))
    assert TokenizerTrainer(config_of(table, steps=99, learning_rate=1e-5)).step == 0
    for damaged in ({}, {"step": "many"}, {"step": -1}):
        write_json(tmp_path / "run" / "last" / "state.json", damaged)
        with pytest.raises(CheckpointError, match="must hold the digests of its files"):
            TokenizerTrainer(config_of(table))


def test_a_bar_takes_the_place_of_the_lines_of_steps(table: dict[str, Any]) -> None:
    said: list[str] = []
    moved: list[tuple[int, int]] = []
    config = config_of(table, steps=25, report_every=10)
    TokenizerTrainer(config).train(said.append, progress=lambda *done: moved.append(done))
    assert moved == [(step, 25) for step in range(1, 26)]
    assert len(said) == 2
    assert all(line.startswith("psnr") for line in said)
