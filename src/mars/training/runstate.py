"""What keeps a run whole: its numbers stay finite, and a second run over its folder is the same run."""

import math
from collections.abc import Mapping
from pathlib import Path

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
            rest = f"continue from {last}" if last.is_dir() else "nothing was saved yet, start again"
            raise TrainingError(f"{name} must be finite, got {value} at step {step}; {rest} with a lower rate")


def write_state(folder: Path, *, step: int, fixed: Mapping[str, int | str]) -> None:
    """Stores how far a run is, and what a run that continues it must share."""
    write_json(folder / FILE, {"step": step, **fixed})


def read_state(folder: Path, *, fixed: Mapping[str, int | str]) -> int:
    """The step that a run is at. What an older state does not hold is not compared.

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
    return step
