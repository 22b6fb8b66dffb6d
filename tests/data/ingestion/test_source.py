import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mars.data.ingestion.records import CaptionColumn, Columns
from mars.data.ingestion.source import open_source
from mars.errors import DataError

FILE = Callable[..., bytes]


def names(path: Path, columns: Columns | None = None) -> list[str]:
    return [item.name for part in open_source(path, columns=columns or Columns()).parts() for item in part()]


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def put_tar(path: Path, *members: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    return path


def test_a_folder_of_pictures_is_found(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "a.png", "b/1.JPG", "b/1.txt", "metadata.csv"):
        put(tmp_path / "photos" / name)
    assert names(tmp_path / "photos") == ["a.png", "metadata.csv", "b/1.JPG", "b/2.jpg"]
    put(tmp_path / "bare" / "0a1b2c")
    assert names(tmp_path / "bare") == ["0a1b2c"]


def test_tars_are_found_one_or_many_beside_the_tables_of_img2dataset(tmp_path: Path) -> None:
    put_tar(tmp_path / "set" / "00001.tar", "000010000.jpg", "000010000.json")
    put_tar(tmp_path / "set" / "00000.tar", "000000000.jpg")
    put_tar(tmp_path / "set" / "more" / "00000.tar", "000000000.jpg")
    put(tmp_path / "set" / "00000.parquet")
    put(tmp_path / "set" / "00000_stats.json")
    assert names(tmp_path / "set") == ["00000.tar/000000000", "00001.tar/000010000", "more/00000.tar/000000000"]
    assert names(tmp_path / "set" / "00001.tar") == ["00001.tar/000010000"]


def test_tables_are_found_one_or_many(tmp_path: Path) -> None:
    for name in ("data/b.jsonl", "data/a.jsonl"):
        put(tmp_path / "set" / name, b'{"image": "1.png"}\n{"image": "2.png"}\n')
    assert names(tmp_path / "set") == ["data/a.jsonl#1", "data/a.jsonl#2", "data/b.jsonl#1", "data/b.jsonl#2"]
    assert names(tmp_path / "set" / "data" / "b.jsonl") == ["b.jsonl#1", "b.jsonl#2"]


def test_what_is_none_of_these_is_one_line(tmp_path: Path) -> None:
    put(tmp_path / "letter.txt")
    (tmp_path / "empty").mkdir()
    put(tmp_path / "both" / "a.png")
    put_tar(tmp_path / "both" / "a.tar", "a.png")
    put(tmp_path / "t.csv", b"image,text\n")
    for path, told in {
        "absent": "nothing is at .*absent; name a folder or file",
        "letter.txt": "letter.txt is neither a tar nor a table; name a folder of pictures",
        "empty": "empty is empty; name a folder of pictures",
        "both": r"both holds both pictures and tars \(a.tar\); name the one or the other",
    }.items():
        with pytest.raises(DataError, match=told):
            open_source(tmp_path / path, columns=Columns())
    with pytest.raises(DataError, match=r"t.csv has no column txt; it has image, text"):
        open_source(tmp_path / "t.csv", columns=Columns(captions=(CaptionColumn(column="txt"),)))


def test_the_listing_tells_sources_apart_that_changed(tmp_path: Path) -> None:
    def listing() -> str:
        return open_source(tmp_path / "set", columns=Columns()).listing

    put(tmp_path / "set" / "a.png")
    first = listing()
    assert listing() == first
    put(tmp_path / "set" / "a.png", b"xy")
    larger = listing()
    put(tmp_path / "set" / "b.txt")
    assert len({first, larger, listing()}) == 3


def test_what_hugging_face_saved_is_read_with_its_splits(tmp_path: Path, picture_file: FILE) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    rows = {"photo": [{"bytes": picture_file(index), "path": None} for index in range(6)], "text": list("abcdef")}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "whole", num_shards=2)
    splits = {"train": whole.select(range(4)), "test": whole.select([5, 4])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    columns = Columns(roles={"image": "photo"})

    def found(name: str) -> list[tuple[object, str, str | None]]:
        source = open_source(tmp_path / name, columns=columns)
        items = [item for part in source.parts() for item in part()]
        return [(item.picture, item.fields["text"], item.fields.get("split")) for item in items]

    assert found("whole") == [(picture_file(index), "abcdef"[index], None) for index in range(6)]
    order = [(0, "train"), (1, "train"), (2, "train"), (3, "train"), (5, "test"), (4, "test")]
    assert found("splits") == [(picture_file(index), "abcdef"[index], split) for index, split in order]
