import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from mars.data.ingestion.files import folder_parts, tar_part
from mars.data.ingestion.items import Item
from mars.errors import DataError


def items(root: Path) -> list[Item]:
    return [item for part in folder_parts(root) for item in part()]


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(path: Path, image: str | None = None) -> list[Item]:
    return list(tar_part(path, name="t.tar", image=image)())


def test_a_folder_is_read_in_the_order_of_names_with_the_texts_beside(tmp_path: Path) -> None:
    put(tmp_path, "z.png", "a.jpg", "a.txt", "a.json", "b/c/x.y.webp", "b/c/x.y.caption", "b/w", ".hidden.png", "a.JPG")
    found = items(tmp_path)
    assert [item.name for item in found] == ["a.JPG", "a.jpg", "z.png", "b/w", "b/c/x.y.webp"]
    assert [sorted(item.texts) for item in found] == [["json", "txt"], ["json", "txt"], [], [], ["caption"]]
    assert found[4].texts["caption"] == tmp_path / "b" / "c" / "x.y.caption"
    assert all(item.problem is None for item in found)


def test_nothing_in_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    put(tmp_path, "film.mp4", "alone.txt", "real/a.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "nothing.png").symlink_to(tmp_path / "absent.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = {item.name: item.problem for item in items(tmp_path)}
    assert found == {
        "alone.txt": "no picture of this name",
        "film.mp4": "not a picture of a kind that is read (.mp4)",
        "linked": "not a file (or a link to a folder or to nothing)",
        "nothing.png": "not a file (or a link to a folder or to nothing)",
        "pipe.png": "not a file (or a link to a folder or to nothing)",
        "real/a.png": None,
    }


def test_names_that_are_not_utf8_have_items(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (found,) = items(tmp_path)
    assert os.fsencode(found.name) == b"caf\xe9.png"


def test_samples_of_a_tar_are_neighbours_of_one_name(tmp_path: Path) -> None:
    members = [
        ("00/a.jpg", b"A"), ("00/a.json", b"{}"), ("00/a.txt", b"text"), ("00/b.en.txt", b"en"), ("00/b.png", b"B"),
        ("b.png", b"C"), ("00/._b.png", b"mac"), ("c.mp4", b"film"), ("c.webp", b"D"),
    ]  # fmt: skip
    found = samples(write_tar(tmp_path / "t.tar", members))
    assert [item.name for item in found] == ["t.tar/00/a", "t.tar/00/b", "t.tar/b", "t.tar/c"]
    assert [item.picture for item in found] == [b"A", b"B", b"C", b"D"]
    assert found[0].texts == {"json": b"{}", "txt": b"text"}
    assert found[1].texts == {"en.txt": b"en"}


def test_what_is_wrong_in_a_tar_is_told(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"A"), ("a.jpg", b"again"), ("b.json", b"{}"), ("c.jpg", b"C"), ("a.jpg", b"A"),
        ("d.jpg", b"D"), ("d.mask.png", b"D"), ("readme", b"text"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "t.tar", members)
    assert [(item.name, item.problem) for item in samples(path)] == [
        ("t.tar/a", None),
        ("t.tar/a", "duplicate key"),
        ("t.tar/b", "no picture of this name"),
        ("t.tar/c", None),
        ("t.tar/a", "duplicate key"),
        ("t.tar/d", "several pictures of this name (jpg, mask.png); choose by --column image=SUFFIX"),
        ("t.tar/readme", "no picture of this name"),
    ]
    chosen = samples(path, "mask.png")
    assert [item.name for item in chosen if item.problem is None] == ["t.tar/d"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_is_cut_anywhere_says_so_behind_what_is_whole(tmp_path: Path, packed: bool) -> None:
    contents = [bytes([1 + index]) * 700 for index in range(3)]
    path = write_tar(tmp_path / "w.tar", [(f"{index}.png", content) for index, content in enumerate(contents)])
    whole = gzip.compress(path.read_bytes()) if packed else path.read_bytes()
    path.write_bytes(whole)
    assert [item.problem for item in samples(path)] == [None] * 3
    for size in range(0, len(whole) - 8 if packed else 3 * 3 * 512, 5 if packed else 256):
        path.write_bytes(whole[:size])
        found = samples(path)
        sound = [item.picture for item in found if item.problem is None]
        assert sound == contents[: len(sound)]
        if not packed or len(sound) < 3:  # behind the last picture only zeros are missing, which are not unpacked
            assert len(found) == len(sound) + 1
            assert (found[-1].problem or "").startswith(f"damaged behind {len(sound)} items (")


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"absent cannot be read \(No such file or directory\)"):
        items(tmp_path / "absent")
