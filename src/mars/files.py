"""Files and folders that appear whole or not at all."""

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from mars.errors import CheckpointError, MarsError


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
    hidden = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        os.replace(hidden, path)
    except OSError as problem:
        raise error(f"cannot write {path}: {reason(problem)}; nothing was written") from problem
    finally:
        with suppress(OSError):
            hidden.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.mkdir()  # not tempfile.mkdtemp, whose folders are their owner's alone
        yield temporary
        _put(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {reason(error)}; nothing was written") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Puts back what a process that was killed between the two moves of `atomic_folder` had moved aside."""
    if _aside(path).is_dir() and not path.exists():
        os.replace(_aside(path), path)


def tidy_folder(path: Path) -> None:
    """Removes what processes that were killed inside `atomic_folder` left beside a path, and puts back what they had
    moved aside: for paths that nobody else is writing to."""
    _recover(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, error: type[MarsError]) -> Iterator[None]:
    """Makes a folder, and keeps other processes that ask for it from writing there; removes it if it stayed empty.

    Raises:
        MarsError: of the given kind, if another process writes there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as cause:
        raise error(f"cannot write {folder}: {reason(cause)}") from cause
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder} is being written by another process; wait for it or end it") from None
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(lock)


def _put(new: Path, path: Path) -> None:
    """Moves a folder into place; a folder that was there is back in place if that fails."""
    old = _aside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


REMEMBERED = 2**28
"""Bytes of files from which it is worth remembering what was computed of them."""


def file_digest(path: Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: Sequence[Path]) -> str:
    """Digest of what files hold, in their order; their names do not count. That of large ones is remembered."""
    whole = hashlib.sha256()
    for path in files:
        compute = partial(file_digest, path)
        whole.update(remembered([path], compute, cache=cache_folder(), what="digest of a file").encode())
    return f"sha256:{whole.hexdigest()}"


def remembered(files: Sequence[Path], compute: Callable[[], str], *, cache: Path, what: str) -> str:
    """A line of text that depends on files alone: computed once, as long as their sizes and times of change stay.

    Only of large files, and only where `cache` can be written.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if sum(size for _, size, _ in stats) < REMEMBERED:
        return compute()
    key = hashlib.sha256(repr((what, sorted(stats))).encode()).hexdigest()
    place = cache / "remembered" / key
    with suppress(OSError, UnicodeDecodeError):
        if known := place.read_text("utf-8"):
            return known
    found = compute()
    with suppress(MarsError), whole_file(place, error=MarsError) as hidden:
        hidden.write_text(found, encoding="utf-8")
    return found
