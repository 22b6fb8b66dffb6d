import math
from pathlib import Path

import pytest
import torch

from mars.errors import CheckpointError
from mars.training.checkpoints import Checkpoints
from mars.training.process import Process
from mars.training.runstate import write_state


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", keep=2, process=Process(torch.device("cpu")))


def save(checkpoints: Checkpoints, step: int, *, score: float | None = None) -> None:
    with checkpoints.saving(step) as folder:
        (folder / "weights").write_text(f"of step {step}", "utf-8")
        write_state(folder, step=step, fixed={}, progress={"score": score})


def newest(checkpoints: Checkpoints) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = checkpoints.newest(notify=said.append)
    return found.name if found else None, said


def test_a_new_run_has_none(checkpoints: Checkpoints) -> None:
    assert newest(checkpoints) == (None, [])
    assert not checkpoints.run.exists()


def test_the_newest_and_the_best_are_kept(checkpoints: Checkpoints) -> None:
    for step, score in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, 3.5)):
        save(checkpoints, step, score=score)
    assert checkpoints.steps() == [2, 4, 5]
    assert (checkpoints.run / "last" / "weights").read_text("utf-8") == "of step 5"
    assert (checkpoints.run / "best" / "weights").read_text("utf-8") == "of step 2"
    save(checkpoints, 6, score=3.0)  # as good, and newer
    assert checkpoints.steps() == [5, 6]
    assert (checkpoints.run / "best").readlink() == Path("checkpoints/step-000006")
    assert newest(checkpoints) == ("step-000006", [])


def test_without_scores_there_is_no_best(checkpoints: Checkpoints) -> None:
    for step in range(4):
        save(checkpoints, step)
    assert checkpoints.steps() == [2, 3]
    assert not (checkpoints.run / "best").is_symlink()


def test_a_score_that_is_no_number_is_never_the_best(checkpoints: Checkpoints) -> None:
    for step, score in ((1, math.nan), (2, 3.0), (3, 4.0)):
        save(checkpoints, step, score=score)
    assert (checkpoints.run / "best").readlink().name == "step-000002"


def test_more_than_a_million_steps_are_in_order(checkpoints: Checkpoints) -> None:
    for step in (999_999, 1_000_000):
        save(checkpoints, step)
    assert newest(checkpoints) == ("step-1000000", [])


@pytest.mark.parametrize("damage", ["weights", "state.json", "empty"])
def test_a_damaged_one_is_told_and_the_one_before_it_is_used(checkpoints: Checkpoints, damage: str) -> None:
    for step in (1, 2):
        save(checkpoints, step)
    if damage == "empty":
        for path in list(checkpoints.at(2).iterdir()):
            path.unlink()
    else:
        (checkpoints.at(2) / damage).write_text("{", "utf-8")
    name, said = newest(checkpoints)
    assert name == "step-000001"
    assert len(said) == 1
    assert str(checkpoints.at(2)) in said[0]
    assert "\n" not in said[0]
    assert (checkpoints.run / "last").readlink().name == "step-000001"
    save(checkpoints, 2)  # it is written again when the run comes there
    assert newest(checkpoints) == ("step-000002", [])


def test_a_save_that_fails_leaves_everything_as_it_was(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    with (
        pytest.raises(CheckpointError, match="cannot write .*step-000002: .*; nothing was written"),
        checkpoints.saving(2),
    ):
        raise OSError(28, "No space left on device")
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000001"]
    assert (checkpoints.run / "last").readlink().name == "step-000001"


def test_what_a_killed_process_left_is_tidied_up(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.at(1).rename(checkpoints.folder / ".step-000001.old")  # between the two moves of a save
    for name in (".step-000003.0a1b2c3d", ".step-000000.gone"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "weights").touch()
    assert newest(checkpoints) == ("step-000002", [])
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000001", "step-000002"]


def test_a_link_that_a_killed_process_did_not_move_is_moved(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.run / "last").unlink()
    (checkpoints.run / "last").symlink_to("checkpoints/step-000001")
    newest(checkpoints)
    assert (checkpoints.run / "last").readlink().name == "step-000002"
