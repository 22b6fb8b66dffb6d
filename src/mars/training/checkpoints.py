"""The checkpoints of a run: each whole or not there, verified before it is used, the newest and the best kept.

RUN/checkpoints/step-000050/   a model's folder (fp32), `training.safetensors` (optimizer, and the trained weights
                               where the model holds their average) and `state.json` (step, score, digests)
RUN/last                       a link to the newest
RUN/best                       a link to the one with the lowest score
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mars.checkpoint import read_json
from mars.errors import CheckpointError
from mars.files import reason, tidy_folder
from mars.training.process import Process
from mars.training.runstate import FILE, check_files

NAME = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """Those of one run.

    Args:
        run: the run's folder.
        keep: how many of the newest stay; the best stays beside them.
    """

    def __init__(self, run: Path, *, keep: int, process: Process) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        self.keep = keep
        self.process = process
        self.damaged: set[int] = set()
        """Steps of those that were found not to be what was written."""

    @property
    def last(self) -> Path:
        """The newest."""
        return self.run / "last"

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Of all that are there, in order; damaged ones too."""
        found = [NAME.fullmatch(path.name) for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def newest(self, *, notify: Callable[[str], None]) -> Path | None:
        """The newest whose files are what was written; none for a new run. `last` and `best` are links to such.

        Raises:
            CheckpointError: if there are some, and all are damaged.
        """
        self._tidy()
        problem = ""
        for step in reversed(self.steps()):
            folder = self.at(step)
            if problem := self._problem(step):
                notify(f"checkpoint {folder} cannot be used, the one before it is tried: {problem}")
                continue
            self._link("last", folder)  # a killed process may not have come so far
            best = self._best(step)
            while best is not None and best != step and (problem := self._problem(best)):
                notify(f"checkpoint {self.at(best)} cannot be used, another one is the best: {problem}")
                best = self._best(step)
            self._link_best(best)
            return folder
        if problem:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used ({problem}); start anew with another out"
            )
        return None

    def _problem(self, step: int) -> str:
        """What is damaged in a checkpoint; nothing where all is well."""
        try:
            check_files(self.at(step))
        except CheckpointError as error:
            self.damaged.add(step)
            return str(error)
        return ""

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of a step to; when the block ends well it is there, and the newest.

        Raises:
            CheckpointError: if the disk is full or cannot be written; what was saved before stays.
        """
        with self.process.folder(self.at(step)) as folder:
            yield folder
        if self.process.is_main:
            try:
                self._keep(step)
            except OSError as error:
                raise CheckpointError(
                    f"cannot tidy up {self.folder}: {reason(error)}; {self.at(step)} stays"
                ) from error

    def _keep(self, step: int) -> None:
        """Points to the newest and the best, and removes what is neither best nor among the newest."""
        self.damaged.discard(step)
        steps = [known for known in self.steps() if known <= step]
        best = self._best(step)
        self._link("last", self.at(step))
        self._link_best(best)
        for known in set(steps) - {*steps[-self.keep :], best}:
            gone = self.folder / f".{self.at(known).name}.gone"
            os.replace(self.at(known), gone)
            shutil.rmtree(gone)

    def _best(self, step: int) -> int | None:
        """The step of the lowest score up to a step, of those not known to be damaged; none without any score."""
        steps = [known for known in self.steps() if known <= step and known not in self.damaged]
        scores = {known: score for known in steps if (score := self._score(known)) is not None}
        return min(scores, key=lambda known: (scores[known], -known), default=None)

    def _link_best(self, best: int | None) -> None:
        if best is not None:
            self._link("best", self.at(best))
        else:
            (self.run / "best").unlink(missing_ok=True)

    def _score(self, step: int) -> float | None:
        try:
            score = read_json(self.at(step) / FILE)["progress"]["score"]
        except (CheckpointError, KeyError, TypeError):
            return None
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else None

    def _link(self, name: str, target: Path) -> None:
        partial = self.run / f".{name}.link"
        with suppress(FileNotFoundError):
            partial.unlink()
        partial.symlink_to(target.relative_to(self.run), target_is_directory=True)
        os.replace(partial, self.run / name)

    def _tidy(self) -> None:
        """Removes what a killed process left half written, and finds again what it had moved aside."""
        for name in {path.name.split(".")[1] for path in self.folder.glob(".step-*.*")}:
            tidy_folder(self.folder / name)
