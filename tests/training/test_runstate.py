import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mars.checkpoint import read_tensors, write_json
from mars.config import from_dict
from mars.data.shards import read_codes, write_codes
from mars.errors import CheckpointError, ConfigError, MarsError, TrainingError
from mars.training.checkpoints import Checkpoints
from mars.training.runstate import check_files, check_finite, fixed_values, read_state, write_state
from mars.training.stages import FREE, DataConfig, OptimizerConfig, StageConfig
from mars.training.trainer import Trainer
from tests.conftest import toml
from tests.training.conftest import OPTIMIZERS, Stage, slots, start, steps, visual

FIXED: dict[str, Any] = {"seed": 3, "optimizer.name": "adamw", "tasks": {"captioning": 0.5}, "lora": None}


def test_a_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    for step in (0, 7):
        write_state(tmp_path, step=step, fixed=FIXED)
        assert read_state(tmp_path, fixed=FIXED) == (step, {})
    write_state(tmp_path, step=8, fixed=FIXED, progress={"score": 0.5})
    assert read_state(tmp_path, fixed=FIXED) == (8, {"score": 0.5})


@pytest.mark.parametrize("damage", ["changed", "shortened", "gone", "state"])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "parts").mkdir()
    path = tmp_path / "parts" / "weights"
    path.write_bytes(b"0123456789")
    write_state(tmp_path, step=7, fixed=FIXED)
    check_files(tmp_path)
    if damage == "gone":
        path.unlink()
    elif damage == "state":
        (path := tmp_path / "state.json").write_text('{"step": 7}', "utf-8")
    else:
        path.write_bytes(b"012345678" + b"0" * (damage == "changed"))
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        check_files(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", 4, "must stay 3, with which .*, got 4; set it back"),
        ("optimizer.name", "muon", "must stay adamw, .*, got muon; set it back"),
        ("tasks", {"captioning": 0.25}, 'must stay {"captioning": 0.5}, .*, got {"captioning": 0.25}; set it back'),
        ("lora", {"rank": 2}, 'must stay null, .*, got {"rank": 2}; set it back'),
    ],
)
def test_what_is_fixed_must_stay(tmp_path: Path, name: str, value: Any, words: str) -> None:
    write_state(tmp_path, step=7, fixed=FIXED)
    with pytest.raises(ConfigError, match=f"^{name} {words}"):
        read_state(tmp_path, fixed=FIXED | {name: value})


def test_what_an_older_state_does_not_name_is_not_compared(tmp_path: Path) -> None:
    write_state(tmp_path, step=7, fixed={"seed": 3})
    assert read_state(tmp_path, fixed=FIXED)[0] == 7


@pytest.mark.parametrize(
    "content", ["{}", '{"step": "7"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[]", ""]
)
def test_a_state_without_a_step_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        read_state(tmp_path, fixed=FIXED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    check_finite({"loss": 1e30, "gradient_norm": 0.0}, step=5, last=tmp_path)
    with pytest.raises(TrainingError, match=f"gradient_norm must be finite, got {value} at step 5; continue from"):
        check_finite({"loss": 1.0, "gradient_norm": value}, step=5, last=tmp_path)
    with pytest.raises(TrainingError, match="loss must be finite, .* nothing was saved yet"):
        check_finite({"loss": value}, step=5, last=tmp_path / "last")


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


OTHER: dict[str, dict[str, Any]] = {
    "stage": {"stage": "align"},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 5},
    "guidance_dropout": {"guidance_dropout": 0.0},
    "top_rows": {"top_rows": 1},
    "special_weight": {"special_weight": 0.0},
    "z_loss": {"z_loss": 1e-4},
    "tasks": {"tasks": {"text_to_image": 0.6, "captioning": 0.4}},
    "upscale": {"upscale": {"codes_per_step": 16}},
    "lora": {"lora": {}},
    "optimizer.name": {"optimizer": {"name": "muon"}},
    "optimizer.betas": {"optimizer": {"betas": [0.9, 0.99]}},
    "data.kinds": {"data": {"kinds": {"name": 1.0}}},
    "data.repeats": {"data": {"repeats": [2]}},
    "data.described": {"data": {"described": {"name": 1.0}}},
    "data.languages": {"data": {"languages": {"en": 1.0}}},
    "data.held_out": {"data": {"held_out": ["concept"]}},
}
"""Of each value that must stay, a change."""


def test_every_value_of_a_stage_is_free_to_change_or_refused(stage: Stage) -> None:
    config = from_dict(StageConfig, stage())
    assert fixed_values(config, free=FREE).keys() == OTHER.keys()
    known = {name for section in (StageConfig, DataConfig, OptimizerConfig) for name in section.__dataclass_fields__}
    assert {name.rpartition(".")[2] for name in FREE} <= known


def test_a_run_cannot_be_continued_as_another(stage: Stage, tiny_model: Path) -> None:
    table = stage()
    trainer = start(table)
    steps(trainer, 1)
    trainer.save()
    table["model"] = {"start_from": str(tiny_model)}  # where it began no longer counts, and some changes need it
    for name, changes in OTHER.items():
        merged = {key: table[key] | value if key in ("data", "optimizer") else value for key, value in changes.items()}
        with pytest.raises(ConfigError, match=f"^{name} must stay .*, got .*; .* start anew") as caught:
            start(table | merged)
        assert "\n" not in str(caught.value)
    assert start(table).step == 1


@pytest.mark.parametrize("change", ["optimizer", "state"])
def test_a_checkpoint_of_another_kind_of_run_is_one_line(stage: Stage, tmp_path: Path, change: str) -> None:
    trainer = start(stage(optimizer=OPTIMIZERS["muon"]))
    steps(trainer, 1)
    trainer.save()
    if change == "state":
        write_json(tmp_path / "run" / "last" / "state.json", {})
    with pytest.raises(MarsError):
        start(stage(optimizer=OPTIMIZERS["adamw" if change == "optimizer" else "muon"]))


def test_a_run_may_be_prolonged_and_its_rates_changed(stage: Stage) -> None:
    trainer = start(stage())
    steps(trainer, 2)
    trainer.save()
    changes: dict[str, Any] = {"steps": 20, "save_every": 3, "name": "b", "accumulate": 2, "recompute": True}
    resumed = start(stage(**changes, optimizer=OPTIMIZERS["adamw"] | {"learning_rate": 1e-4, "decay": 5}))
    assert resumed.step == 2
    assert resumed.optimizers[0].param_groups[0]["peak"] == 1e-4
    steps(resumed, 1)


def test_a_run_over_other_pictures_is_another_run(stage: Stage, tmp_path: Path, tiny_codes: Path) -> None:
    start(stage()).save()
    coded, digest = read_codes(tiny_codes)
    for name, kept, count in (("few", coded[:9], 9), ("turned", coded[::-1], 24)):
        write_codes(tmp_path / f"{name}.parquet", kept, tokenizer=digest)
        message = f"data.shards must stay 24 pictures, sha256:.*, got {count} pictures, sha256:"
        with pytest.raises(ConfigError, match=message):
            start(stage(data={"shards": [str(tmp_path / f"{name}.parquet")]}))
    moved = shutil.copy(tiny_codes, tmp_path / "moved.parquet")
    assert start(stage(data={"shards": [str(moved)]})).step == 0


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
