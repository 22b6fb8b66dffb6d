import json
from pathlib import Path

import pytest
from PIL import Image

from mars.errors import TrainingError
from mars.training import runlog
from mars.training.runlog import RunLog
from tests.conftest import files_end_at


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_numbers_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run")
    log.write(3, {"loss": 1.5, "gradient_norm": 0.25})
    (line,) = lines(tmp_path / "new" / "run")
    assert {name: line[name] for name in ("step", "loss", "gradient_norm")} == {
        "step": 3, "loss": 1.5, "gradient_norm": 0.25,
    }  # fmt: skip
    log.close()


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.close()
    log = RunLog(tmp_path, step=2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_run_over_an_old_log_starts_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = RunLog(tmp_path)
        log.write(1, {"loss": 1.0})
        log.close()
    assert len(lines(tmp_path)) == 1


def test_a_log_that_cannot_be_shortened_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.close()
    message = r"cannot write .*log\.jsonl: .*; nothing was written"
    with files_end_at(20), pytest.raises(TrainingError, match=message):
        RunLog(tmp_path, step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_resumed_run_keeps_its_checkpoints_own_step_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, step=start)
        for step in steps:
            log.write(step, {"loss": 10.0 * start + step})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path)
    log.write(7, {"loss": 2.5})
    log.picture(7, "samples", Image.new("RGB", (8, 4), "red"))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (7, 2.5)
    (picture,) = events.Images("samples")
    assert (picture.width, picture.height) == (8, 4)


def test_without_tensorboard_the_log_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    log = RunLog(tmp_path)
    log.write(1, {"loss": 1.0})
    log.picture(1, "samples", Image.new("RGB", (8, 8)))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_half_a_line_at_the_end_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo', "utf-8")
    RunLog(tmp_path, step=5).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    log = RunLog(tmp_path / "run")
    message = "cannot write the log in .*run: .*; make room and run again"
    with files_end_at(20), pytest.raises(TrainingError, match=message) as caught:
        log.write(1, {"loss": 1.0})
    log.close()
    assert "\n" not in str(caught.value)
