import math
import shutil
from pathlib import Path

import pytest
import torch

from mars.checkpoint import load_model, read_json
from mars.config import from_dict
from mars.errors import CheckpointError
from mars.training import trainer as module
from mars.training.checkpoints import Checkpoints
from mars.training.process import Process
from mars.training.runstate import write_state
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer
from tests.conftest import files_end_at
from tests.training.conftest import OPTIMIZERS, Stage, start, steps


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


@pytest.mark.parametrize("scores", [(5.0, 3.0, 4.0), (None, 3.0, None)], ids=["another", "none"])
def test_a_damaged_one_is_not_the_best(checkpoints: Checkpoints, scores: tuple[float | None, ...]) -> None:
    for step, score in enumerate(scores, start=1):
        save(checkpoints, step, score=score)
    assert (checkpoints.run / "best").readlink().name == "step-000002"
    (checkpoints.at(2) / "weights").write_text("of another step", "utf-8")
    name, said = newest(checkpoints)
    assert name == "step-000003"
    assert len(said) == 1
    assert f"checkpoint {checkpoints.at(2)} cannot be used, another one is the best: " in said[0]
    for step in (4, 5, 6):
        if scores[0] is None:
            assert not (checkpoints.run / "best").is_symlink()
        else:
            assert (checkpoints.run / "best").readlink().name == "step-000003"
        save(checkpoints, step, score=None if scores[0] is None else 9.0)
    assert checkpoints.steps() == ([5, 6] if scores[0] is None else [3, 5, 6])


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


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(stage: Stage, tmp_path: Path) -> None:
    trainer = start(stage())
    steps(trainer, 2)
    trainer.save()
    steps(trainer, 1)
    with files_end_at(20_000), pytest.raises(CheckpointError, match=r"cannot write .*step-000003") as caught:
        trainer.save()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert start(stage()).step == 2
    trainer.save()
    assert start(stage()).step == 3
