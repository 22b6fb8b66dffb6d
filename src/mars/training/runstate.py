"""What keeps a run whole: its numbers stay finite, its files are what was written, and a second run over its folder is
the same run."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mars.checkpoint import read_json, write_json
from mars.errors import CheckpointError, ConfigError, TrainingError

FILE = "state.json"


def check_finite(values: Mapping[str, float], *, step: int, last: Path) -> None:
    """To be called before weights move, so that what is saved next is still good.

    Args:
        values: losses and the norm of the gradients.
        last: the folder of the saved state.

    Raises:
        TrainingError: naming the first value that is NaN or infinite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} must be finite, got {value} at step {step}; {continue_from(last)}")


def continue_from(last: Path) -> str:
    """What to do after a run diverged."""
    rest = f"continue from {last}" if last.is_dir() else "nothing was saved yet, start again"
    return f"{rest} with a lower rate"


def write_state(
    folder: Path, *, step: int, fixed: Mapping[str, int | str], progress: Mapping[str, Any] | None = None
) -> None:
    """Stores how far a run is, beside everything else that it saved: to be called last.

    Args:
        fixed: what a run that continues it must share.
        progress: what else it must know, ready for JSON.
    """
    files = {str(path.relative_to(folder)): _digest(path) for path in _files(folder)}
    write_json(folder / FILE, {"step": step, **fixed, "progress": dict(progress or {}), "files": files})


def check_files(folder: Path) -> None:
    """Compares every file of a saved state with its digest.

    Raises:
        CheckpointError: naming the first that is missing or another.
    """
    files = read_json(folder / FILE).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / FILE} must hold the digests of its files, got {type(files).__name__}")
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if _digest(path) != wanted:
            raise CheckpointError(f"{path} is damaged: it is not what was written")


def read_state(folder: Path, *, fixed: Mapping[str, int | str]) -> tuple[int, dict[str, Any]]:
    """The step that a run is at, and what else it stored. What an older state does not hold is not compared.

    Raises:
        CheckpointError: if the state is missing or damaged.
        ConfigError: if the run was started with another value of something that is fixed.
    """
    state = read_json(folder / FILE)
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / FILE} must hold the step, a number from 0, got {step!r}")
    for name, wanted in fixed.items():
        if (found := state.get(name, wanted)) != wanted:
            raise ConfigError(
                f"{name} must stay {found}, with which {folder} was trained, got {wanted}; "
                "set it back, or start anew with --set out=DIR"
            )
    return step, dict(state.get("progress") or {})


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
