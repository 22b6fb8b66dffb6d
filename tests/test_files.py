import errno
from pathlib import Path

import pytest

from mars.errors import DataError
from mars.files import whole_file


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
