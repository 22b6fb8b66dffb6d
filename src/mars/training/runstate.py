"""What keeps a run whole: its numbers stay finite, its files are what was written, and a second run over its folder is
the same run."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mars.checkpoint import read_json, write_json
from mars.config import to_dict
from mars.errors import CheckpointError, ConfigError, TrainingError
from mars.files import file_digest

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


def fixed_values(config: Any, *, free: Collection[str]) -> dict[str, Any]:
    """What a run that is continued must share: all values of a configuration, by their full names, but those that are
    `free` to change."""

    def chosen(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            name = f"{where}{key}"
            if any(one.startswith(f"{name}.") for one in free):
                yield from chosen(value, f"{name}.")
            elif name not in free:
                yield name, value

    return dict(chosen(to_dict(config), ""))


def write_state(
    folder: Path, *, step: int, fixed: Mapping[str, Any], progress: Mapping[str, Any] | None = None
) -> None:
    """Stores how far a run is, beside everything else that it saved: to be called last.

    Args:
        fixed: what a run that continues it must share, ready for JSON.
        progress: what else it must know, ready for JSON.
    """
    files = {str(path.relative_to(folder)): f"sha256:{file_digest(path)}" for path in _files(folder)}
    write_json(folder / FILE, {"step": step, "fixed": dict(fixed), "progress": dict(progress or {}), "files": files})


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
        if f"sha256:{file_digest(path)}" != wanted:
            raise CheckpointError(f"{path} is damaged: it is not what was written")


def read_state(folder: Path, *, fixed: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step that a run is at, and what else it stored. What an older state does not name is not compared.

    Raises:
        CheckpointError: if the state is missing or damaged.
        ConfigError: if the run was started with another value of something that is fixed.
    """
    state = read_json(folder / FILE)
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / FILE} must hold the step, a number from 0, got {step!r}")
    stored = state.get("fixed") or {}
    for name, wanted in fixed.items():
        if (found := stored.get(name, wanted)) != wanted:
            raise ConfigError(
                f"{name} must stay {_shown(found)}, with which {folder} was trained, got {_shown(wanted)}; "
                "set it back, or start anew with --set out=DIR"
            )
    return step, dict(state.get("progress") or {})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
