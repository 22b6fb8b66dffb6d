"""Files that appear whole or not at all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mars.errors import MarsError


def reason(error: Exception) -> str:
    """Why a file could not be written, in a few words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def whole_file(path: Path, *, error: type[MarsError]) -> Iterator[Path]:
    """A hidden name beside `path` to write to: it becomes `path` when the block ends well, and vanishes when not.

    Raises:
        error: if the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as problem:
        raise error(f"cannot write {path}: {reason(problem)}; nothing was written") from problem
    finally:
        with suppress(OSError):
            partial.unlink()


def place_for(folder: Path, *, error: type[MarsError], may_replace: Callable[[Path], bool] = lambda _: False) -> Path:
    """Where a folder is to be written, as an absolute path.

    Raises:
        error: if something is there that would be lost: anything but an empty folder or what `may_replace` says.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or may_replace(folder))):
        raise error(f"{folder} must be new or empty, as what is there would be lost; name another folder")
    return folder


def cache_folder() -> Path:
    """Where converted and compiled files are kept: $MARS_CACHE or ~/.cache/mars."""
    return Path(os.environ.get("MARS_CACHE") or "~/.cache/mars").expanduser()
