from pathlib import Path

import pytest

from mars.data.picture_set import set_digest, set_size
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Picture, Record, write_pictures
from mars.errors import DataError
from tests.data.conftest import art, encoded


def pictures(count: int) -> list[Picture]:
    fields = {"concept": "", "style": "", "split": "train", "source": "", "licence": "", "captions": ()}
    return [
        Picture(record=Record(key=f"p{number}", **fields), content=encoded(art(number, size=(16, 16))))  # type: ignore[arg-type]
        for number in range(count)
    ]


def write(folder: Path, count: int) -> Path:
    with ShardFolder(folder, settings={}, max_pictures=2) as shards:
        for one in pictures(count):
            shards.add(one, consumed=0)
        shards.finish()
    return folder


def test_a_set_has_a_size_and_a_digest_of_what_is_in_it(tmp_path: Path) -> None:
    one, same, more = write(tmp_path / "a", 5), write(tmp_path / "b", 5), write(tmp_path / "c", 6)
    write_pictures(tmp_path / "d.tar", pictures(5))
    assert [set_size(path) for path in (one, more, tmp_path / "d.tar")] == [5, 6, 5]
    assert set_digest(one) == set_digest(same) != set_digest(more)
    assert len(set_digest(tmp_path / "d.tar")) == 64


def test_what_is_no_whole_set_has_none(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError):
            set_digest(path)
    damaged = write(tmp_path / "a", 5)
    (damaged / "shard-000001.json").write_text("{}")
    with pytest.raises(DataError, match="make it again"):
        set_digest(damaged)
