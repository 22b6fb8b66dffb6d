"""What a run leaves behind to look at: `log.jsonl`, and TensorBoard events where the package is installed."""

import json
import math
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from mars.errors import TrainingError
from mars.files import reason, whole_file


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # a killed run left half a line
        return math.inf


class RunLog:
    """Appends to a run's folder; a resumed run drops what an earlier one wrote beyond its checkpoint.

    Raises:
        TrainingError: if the folder cannot be written; what was in the log stays.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        self.folder = folder
        path = folder / "log.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        with whole_file(path, error=TrainingError) as partial:  # a process that is killed here has lost no line
            partial.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), "utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.board: Any = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # it drops that step too

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers; TrainingError if it cannot be written."""
        try:
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
        except OSError as error:
            raise TrainingError(
                f"cannot write the log in {self.folder}: {reason(error)}; make room and run again"
            ) from error

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """One picture, to TensorBoard only."""
        if self.board is not None:
            import numpy as np

            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Ends the log."""
        with suppress(OSError):  # what could not be written has been told
            self.file.close()
            if self.board is not None:
                self.board.close()
