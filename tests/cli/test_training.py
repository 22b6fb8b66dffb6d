import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mars.checkpoint import load_image_tokenizer, load_model
from mars.cli.progress import Report
from mars.cli.training import draw_samples, start_training
from mars.errors import DataError
from mars.files import locked
from mars.training.meters import Pace
from mars.training.tasks import Drawing, TextToImage
from mars.training.trainer import Trainer
from tests.cli.conftest import Run
from tests.conftest import toml

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def config(stage: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A configuration that trains the tiny model for six steps and draws once."""
    path = tmp_path / "tiny.toml"
    table = stage(steps=6, report_every=2, sample_every=4, sample_prompts=["a red apple", "红苹果"])
    path.write_text(toml(table), "utf-8")
    return path


@pytest.fixture
def tokenizer_config(tmp_path: Path, tiny_pictures: Path) -> Path:
    """A configuration that trains a tiny image tokenizer for 25 steps."""
    path = tmp_path / "tokenizer.toml"
    table = {
        "stage": "tokenizer", "data": [str(tiny_pictures)], "out": str(tmp_path / "run"), "steps": 25, "batch_size": 2,
        "crop": 16, "perceptual_weight": 0.0,
        "tokenizer": {"num_codes": 16, "code_width": 8, "channels": [32], "patch": 16, "blocks_per_level": 1},
    }  # fmt: skip
    path.write_text(toml(table), "utf-8")
    return path


@pytest.fixture
def train(run: Run) -> Train:
    """Runs `mars train ARGUMENTS`; returns the exit code and standard error."""

    def ran(*arguments: object) -> tuple[int, str]:
        code, out, err = run("train", *arguments)
        assert out == ""
        return code, err

    return ran


def test_a_stage_is_trained_continued_and_then_done(train: Train, config: Path, tmp_path: Path) -> None:
    code, err = train(config)
    assert code == 0
    assert [line.split()[1] for line in err.splitlines() if line.startswith("step")] == ["2/6", "4/6", "6/6"]
    assert "tokens/s" in err
    assert f"the model is in {tmp_path / 'run' / 'model'}" in err
    with Image.open(tmp_path / "run" / "samples" / "latest.png") as samples:
        assert samples.size == (2 * 48, 32 + 16)
    assert load_model(tmp_path / "run" / "model").info.name == "tiny"

    code, err = train(config)
    assert code == 2
    assert err.count("\n") == 1
    assert "has already been trained for 6 steps; ask for more with --set steps=N" in err

    code, err = train(config, "--set", "steps=8")
    assert code == 0
    assert f"continuing {tmp_path / 'run'} at step 6" in err
    lines = (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


def test_a_tokenizer_is_trained(train: Train, tokenizer_config: Path, tmp_path: Path) -> None:
    code, err = train(tokenizer_config, "--set", "batch_size=3", "--set", "steps=3")
    assert code == 0
    assert "psnr" in err
    assert load_image_tokenizer(tmp_path / "run" / "last")[0].config.num_codes == 16


def test_a_second_run_into_one_folder_is_one_line(
    train: Train, config: Path, tokenizer_config: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "run" / ".last.1"  # what the first run is about to move into place
    with locked(tmp_path / "run", error=DataError):
        hidden.mkdir()
        for one in (config, tokenizer_config):
            code, err = train(one)
            assert (code, err.count("\n")) == (2, 1)
            assert "run is being written by another process" in err
        assert hidden.is_dir()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", ["unknown key stepz", "did you mean steps"]),
        ("optimizer.learning_rat=3", ["unknown key optimizer.learning_rat", "did you mean optimizer.learning_rate"]),
        ("steps=many", ["steps must be int, got 'many'"]),
        ("batch_size=2.5", ["batch_size must be int, got 2.5"]),
        ("optimizer.learning_rate=-0.1", ["optimizer.learning_rate must be greater than 0", "got -0.1"]),
        ("optimizer.name=sgd", ["optimizer.name must be"]),
        ("stage=finetune", ["stage must be"]),
        ("steps", ["must look like section.key=value"]),
        ("name.first=a", ["cannot be set"]),
        ("model.semvie.share_norms=true", ["semvie.share_norms needs visual_width"]),
        ("data.shards=[\"none.parquet\"]", ["no code shard at none.parquet"]),
        ("data.kinds={other=1.0}", ["no picture to train on"]),
        ("model.language=none.gguf", ["no such file"]),
        ("model.image_tokenizer=none", ["image_tokenizer"]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line_and_leaves_nothing(
    train: Train, config: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    code, err = train(config, "--set", override)
    assert code in (1, 2)
    assert err.startswith("mars: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, "steps = ", "steps = 1\nsteps = 2", "a" * 10, "\x00"])
def test_a_file_that_is_no_configuration_is_one_line(train: Train, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_text(content, "utf-8")
    code, err = train(path)
    assert (code, err.count("\n")) == (2, 1)
    assert str(path) in err


def test_samples_are_a_row_of_pictures_that_repeats(tiny_model: Path) -> None:
    sheet = draw_samples(tiny_model, ["a", "红", "c"])
    assert sheet.size == (3 * 48, 48)
    assert sheet.tobytes() == draw_samples(tiny_model, ["a", "红", "c"]).tobytes()


def test_a_tokenizer_moves_a_bar_on_a_terminal(tokenizer_config: Path) -> None:
    moved: list[tuple[int, int | None]] = []

    @contextmanager
    def bar(what: str) -> Iterator[Report]:
        assert what == "training"
        yield lambda done, total: moved.append((done, total))

    said: list[str] = []
    start_training(tokenizer_config, [], say=said.append, bar=bar)
    assert moved[-1] == (25, 25)
    assert not any(line.startswith("step") for line in said)


def test_a_run_that_diverges_is_one_line(
    train: Train, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(_: TextToImage, batch: Sequence[Drawing]) -> dict[str, Tensor]:
        return {"total": torch.full((), nan, requires_grad=True)}

    monkeypatch.setattr(TextToImage, "losses", diverged)
    code, err = train(config, "--set", "tasks={text_to_image=1}", "--set", "max_skipped=2")
    assert code == 1
    assert err.splitlines()[-1] == (
        "mars: text_to_image/total must be finite, got nan at step 1, and so were 2 steps in a row; "
        f"the batch is in {tmp_path / 'run' / 'skipped-step-000001.json'}; "
        "nothing was saved yet, start again with a lower rate"
    )
    assert "got nan at step 0; the step is skipped" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_which_is_saved(
    train: Train, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    learn = Trainer.train_step

    def step(trainer: Trainer, pace: Pace | None = None) -> dict[str, float]:
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return learn(trainer, pace)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "train_step", step)
    found, err = train(config)
    assert found == code
    assert err.splitlines()[-1] == "stopped at step 3, which is saved; run the same command again to continue"
    assert signal.getsignal(number) is before
    monkeypatch.setattr(Trainer, "train_step", learn)
    found, err = train(config)
    assert found == 0
    assert f"continuing {tmp_path / 'run'} at step 3" in err


def test_a_second_signal_does_not_wait(train: Train, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(trainer: Trainer, pace: Pace | None = None) -> dict[str, float]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal was ignored")

    monkeypatch.setattr(Trainer, "train_step", step)
    code, _ = train(config)
    assert code == 130  # as typer reports an interrupt


def test_an_adapter_is_trained_drawn_with_and_refused_by_another_model(
    train: Train,
    run: Run,
    stage: Callable[..., dict[str, Any]],
    tiny_model: Path,
    even_model: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lora.toml"
    table = stage(stage="align", steps=4, sample_every=2, sample_prompts=["x"], lora={"rank": 2})
    table["model"] = {"start_from": str(tiny_model)}
    table["optimizer"] = {"learning_rate": 0.1, "warmup": 1}
    path.write_text(toml(table), "utf-8")
    code, err = train(path)
    assert code == 0
    adapter = tmp_path / "run" / "adapter"
    assert err.splitlines()[-1] == f"the adapter is in {adapter}"
    assert (tmp_path / "run" / "samples" / "latest.png").is_file()
    draw = ("generate", "x", "--seed", 1, "--model")
    files = {}
    for name, options in {
        "plain": (),
        "adapted": ("--lora", adapter),
        "off": ("--lora", adapter, "--lora-scale", 0),
    }.items():
        assert run(*draw, tiny_model, "--out", f"{name}.png", *options)[0] == 0
        files[name] = Image.open(f"{name}.png").convert("RGB").tobytes()
    assert files["plain"] == files["off"] != files["adapted"]
    code, out, err = run(*draw, even_model, "--lora", adapter)
    assert (code, out) == (1, "")
    assert "was trained on the visual expert" in err
    assert err.count("\n") == 1
