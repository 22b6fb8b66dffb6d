import errno
import os
import shutil
from pathlib import Path

import pytest

from mars import files
from mars.errors import CheckpointError, DataError
from mars.files import place_for, remembered, whole_file


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
