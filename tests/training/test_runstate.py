from pathlib import Path

import pytest

from mars.errors import CheckpointError, ConfigError, TrainingError
from mars.training.runstate import check_files, check_finite, read_state, write_state

FIXED: dict[str, int | str] = {"seed": 3, "optimizer": "adamw"}


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


@pytest.mark.parametrize("changes", [{"seed": 4}, {"optimizer": "muon"}])
def test_what_is_fixed_must_stay(tmp_path: Path, changes: dict[str, int | str]) -> None:
    write_state(tmp_path, step=7, fixed=FIXED)
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=f"{name} must stay {FIXED[name]}, .*, got {changes[name]}; set it back"):
        read_state(tmp_path, fixed=FIXED | changes)


def test_what_an_older_state_does_not_hold_is_not_compared(tmp_path: Path) -> None:
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
