import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mars.data.curation.duplicates import perceptual_hash
from mars.data.curation.removal import RemovalList
from mars.data.shards import Picture
from mars.errors import DataError
from tests.data.conftest import art

URL = "https://pictures.example/a.png"


def removal(folder: Path, text: str, *, distance: int = 4) -> RemovalList:
    path = folder / "gone.txt"
    path.write_text(text, "utf-8")
    return RemovalList([path], distance=distance)


@pytest.mark.parametrize("what", ["key", "url", "sha256", "SHA256"])
def test_a_picture_is_named_by_key_url_or_content(
    tmp_path: Path, make_picture: Callable[..., Picture], what: str
) -> None:
    picture = make_picture("some-key", number=1, url=URL)
    digest = hashlib.sha256(picture.content).hexdigest()
    entry = {"key": "some-key", "url": URL, "sha256": digest, "SHA256": digest.upper()}[what]
    found = removal(tmp_path, f"# asked for by mail\n\n  {entry}  \n").match(picture)
    assert found == f"{digest if what == 'SHA256' else entry} in gone.txt"
    assert removal(tmp_path, "# some-key\nsome\n").match(picture) is None


def test_a_listed_hash_names_pictures_near_it(tmp_path: Path) -> None:
    listed = perceptual_hash(art(1))
    some = removal(tmp_path, f"{listed:016X}\n")
    assert some.match_hash(listed) == some.match_hash(listed ^ 0b1111) == f"{listed:016x} in gone.txt"
    assert some.match_hash(listed ^ 0b11111) is None


def test_without_lists_nothing_is_named(make_picture: Callable[..., Picture]) -> None:
    none = RemovalList([], distance=4)
    assert none.match(make_picture()) is None
    assert none.match_hash(0) is None


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "gone.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="one entry a line"):
        RemovalList([path], distance=0)
