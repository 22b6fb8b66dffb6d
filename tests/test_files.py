import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from mars import files
from mars.errors import CheckpointError, ConfigError, DataError
from mars.files import atomic_folder, locked, place_for, remembered, tidy_folder, whole_file


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with whole_file(path, error=DataError) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x"), KeyboardInterrupt()]
)
def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_text("old")
    expected = DataError if isinstance(error, OSError) else type(error)

    def half() -> None:
        with whole_file(tmp_path / "a.txt", error=DataError) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        half()
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {tmp_path / 'a.txt'}: the disk is full; nothing was written"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


def fill(folder: Path, value: str) -> None:
    with atomic_folder(folder) as new:
        (new / "value.txt").write_text(value, "utf-8")


def value_of(folder: Path) -> str:
    return (folder / "value.txt").read_text("utf-8")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    fill(folder, "old")
    with atomic_folder(folder) as new:
        (new / "value.txt").write_text("new", "utf-8")
        assert value_of(folder) == "old"
    assert [file.name for file in folder.iterdir()] == ["value.txt"]
    assert value_of(folder) == "new"
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    fill(tmp_path / "model", "old")

    def half() -> None:
        with atomic_folder(tmp_path / "model") as new:
            (new / "half").touch()
            raise error

    with pytest.raises((CheckpointError, KeyError, KeyboardInterrupt)) as caught:
        half()
    assert isinstance(caught.value, CheckpointError) == isinstance(error, OSError)
    assert value_of(tmp_path / "model") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = tmp_path / "model"
    fill(folder, "old")
    moves = 0
    replace = os.replace

    def sometimes(source: Path, target: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(CheckpointError, match="nothing was written"):
        fill(folder, "new")
    assert value_of(folder) == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_a_killed_process_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    tidy_folder(tmp_path / "model")
    assert value_of(tmp_path / "model") == "old"
    (tmp_path / "model").rename(tmp_path / ".model.old")
    fill(tmp_path / "model", "new")
    tidy_folder(tmp_path / "model")
    assert value_of(tmp_path / "model") == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_killed_processes_left_beside_a_folder_is_removed(tmp_path: Path) -> None:
    for name in (".a[1].0a1b2c3d", ".a[1].old", ".a1.0a1b2c3d", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name, "utf-8")
    for _ in range(2):
        tidy_folder(tmp_path / "a[1]")
        assert {path.name for path in tmp_path.iterdir()} == {"a[1]", ".a1.0a1b2c3d", "b"}
        assert (tmp_path / "a[1]" / "file").read_text("utf-8") == ".a[1].old"
    tidy_folder(tmp_path / "none" / "c")
    assert not (tmp_path / "none").exists()


def test_a_saved_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    fill(tmp_path / "model", "new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_in_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write .*; nothing was written") as caught:
        fill(tmp_path / "file" / "model", "new")
    assert "\n" not in str(caught.value)


def test_a_place_is_new_or_empty_or_holds_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/new"):
        assert place_for(tmp_path / name, error=CheckpointError) == (tmp_path / name).resolve()
    (tmp_path / "file").touch()
    for name in (".", "file"):
        with pytest.raises(CheckpointError, match="must be new or empty, as what is there would be lost; name another"):
            place_for(tmp_path / name, error=CheckpointError)
    assert place_for(tmp_path, error=CheckpointError, may_replace=lambda folder: (folder / "file").exists()) == tmp_path


def test_a_place_is_absolute_even_if_it_is_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_for(Path(), error=CheckpointError) == tmp_path.resolve()


def test_what_large_files_say_is_computed_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "REMEMBERED", 4)
    path, cache, calls = tmp_path / "a.bin", tmp_path / "cache", list[str]()

    def compute() -> str:
        calls.append(path.read_text())
        return calls[-1].upper()

    def ask(what: str = "x") -> str:
        return remembered([path], compute, cache=cache, what=what)

    path.write_text("large")
    assert [ask(), ask(), ask()] == ["LARGE"] * 3
    assert calls == ["large"]
    assert ask("another question") == "LARGE"
    assert len(calls) == 2
    path.write_text("other")
    os.utime(path, ns=(1, 1))
    assert ask() == "OTHER"
    path.write_text("sml")
    assert ask() == ask() == "SML"
    assert calls[-2:] == ["sml", "sml"]
    for file in (cache / "remembered").iterdir():
        file.write_text("")
    os.utime(path, ns=(1, 1))
    path.write_text("other")
    os.utime(path, ns=(1, 1))
    assert ask() == "OTHER"
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert ask() == "OTHER"


def test_one_process_writes_at_a_time_and_the_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder, error=DataError):
        with (
            pytest.raises(ConfigError, match="b is being written by another process"),
            locked(folder, error=ConfigError),
        ):
            pass
        (folder / "file").touch()
    with pytest.raises(KeyError), locked(folder, error=DataError):
        raise KeyError
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    assert (folder / "file").exists()
    with locked(tmp_path / "empty", error=DataError):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DataError, match="cannot write .*file/below: Not a directory"),
        locked(tmp_path / "file" / "below", error=DataError),
    ):
        pass
