import csv
import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mars.data.ingestion.ingest import ingest
from mars.data.ingestion.items import Item
from mars.data.ingestion.records import CaptionColumn, Columns
from mars.data.ingestion.source import open_source
from mars.data.shards import read_pictures
from mars.errors import DataError

FILE = Callable[..., bytes]
Rows = list[dict[str, Any]]


def put(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_metadata(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)


def items(path: Path, columns: Columns | None = None) -> list[Item]:
    return [item for part in open_source(path, columns=columns or Columns()).parts() for item in part()]


def oracle(folder: Path, cache: Path, column: str = "image") -> dict[str, list[tuple[bytes, str]]]:
    """What `datasets` finds in a folder, by split; it leaves files open, which are collected here and now."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        found = _loaded(folder, cache, column)
        gc.collect()
    return found


def _loaded(folder: Path, cache: Path, column: str) -> dict[str, list[tuple[bytes, str]]]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    found = {}
    for split, rows in datasets.load_dataset(str(folder), cache_dir=str(cache)).items():
        rows = rows.cast_column(column, datasets.Image(decode=False))
        found[str(split)] = [
            (row[column]["bytes"] or Path(row[column]["path"]).read_bytes(), row["text"]) for row in rows
        ]
    return found


def ours(folder: Path, out: Path, columns: Columns | None = None) -> dict[str, list[tuple[bytes, str]]]:
    """What is in the shards that are made of it, by split."""
    ingest([folder], out=out, columns=columns)
    found: dict[str, list[tuple[bytes, str]]] = {}
    for picture in read_pictures(out):
        (caption,) = picture.record.captions
        found.setdefault(picture.record.split, []).append((picture.content, caption.text))
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata_holds_what_datasets_finds_in_it(tmp_path: Path, picture_file: FILE, kind: str) -> None:
    folder = tmp_path / "set"
    for split, count in (("train", 3), ("test", 2)):
        names = [f"{'deep/' * (number % 2)}{count}{number}.png" for number in range(count)]
        for number, name in enumerate(names):
            put(folder / split / name, picture_file(10 * count + number))
        rows = [{"file_name": name, "text": f"a cat, “{split}”, {name}"} for name in reversed(names)]
        write_metadata(folder / split / f"metadata.{kind}", rows)
    put(folder / "train" / "unnamed.png", picture_file(99))
    put(folder / "README.md", b"---\nlicense: mit\n---\n")
    found = ours(folder, tmp_path / "out")
    assert found == oracle(folder, tmp_path / "cache")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "test": 2}
    told = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in told} == {
        "set/README.md": "not a picture of a kind that is read (.md)",
        "set/train/unnamed.png": "no row of the metadata names it",
    }


def test_of_several_pictures_in_a_row_the_one_that_was_named_is_taken(tmp_path: Path, picture_file: FILE) -> None:
    folder = tmp_path / "set"
    rows = []
    for number in range(2):
        names = {f"{what}_file_name": f"{what}/{number}.png" for what in ("drawn", "mask")}
        for place, name in enumerate(names.values()):
            put(folder / name, picture_file(2 * number + place))
        rows.append({**names, "text": f"a cat {number}"})
    write_metadata(folder / "metadata.jsonl", rows)
    with pytest.raises(DataError, match=r"several files in a row; say .*: --column image=drawn_file_name"):
        open_source(folder, columns=Columns())
    columns = Columns(roles={"image": "mask_file_name"})
    assert ours(folder, tmp_path / "out", columns) == oracle(folder, tmp_path / "cache", "mask")
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == "", "the other pictures of a row are no strangers"


def test_texts_beside_the_pictures_are_read_too(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.png")
    put(tmp_path / "set" / "a.txt", "一只猫".encode())
    put(tmp_path / "set" / "b.png")
    put(tmp_path / "set" / "alone.txt")
    write_metadata(tmp_path / "set" / "metadata.csv", [{"file_name": f"{name}.png", "text": name} for name in "ab"])
    first, second, alone = items(
        tmp_path / "set", Columns(captions=(CaptionColumn(column="txt"), CaptionColumn(column="text")))
    )
    assert first.texts == {"txt": tmp_path / "set" / "a.txt"}
    assert (first.fields, second.fields, second.texts) == ({"text": "a"}, {"text": "b"}, {})
    assert (alone.name, alone.problem) == ("alone.txt", "no picture of this name")


def test_what_a_table_does_not_name_is_told_and_folders_without_one_are_as_ever(tmp_path: Path) -> None:
    for name in ("a/named.png", "a/deep/named.png", "a/deep/other.png", "a/other.jpg", "b/1.png", "b/1.txt", "c.png"):
        put(tmp_path / "set" / name)
    names = ["named.png", "deep/named.png", "absent.png", "../c.png", "named.png"]
    write_metadata(tmp_path / "set" / "a" / "metadata.csv", [{"file_name": name} for name in names])
    write_metadata(tmp_path / "set" / "b" / "metadata.csv", [{"id": "1"}])
    found = items(tmp_path / "set")
    assert [(item.name, item.problem) for item in found] == [
        ("a/metadata.csv#1", None),
        ("a/metadata.csv#2", None),
        ("a/metadata.csv#3", None),  # a file that is missing is told when it is opened
        ("a/metadata.csv#4", "path outside the folder of its table ('../c.png')"),
        ("a/metadata.csv#5", None),  # as `datasets` has it: two rows are two pictures
        ("c.png", None),
        ("a/other.jpg", "no row of the metadata names it"),
        ("a/deep/other.png", "no row of the metadata names it"),
        ("b/1.png", None),
        ("b/metadata.csv", "metadata without a column file_name"),
    ]
    assert found[8].texts == {"txt": tmp_path / "set" / "b" / "1.txt"}
    whole = list(open_source(tmp_path / "set", columns=Columns()).parts())
    for place in range(len(whole)):  # a run that goes on behind the rows knows what they named
        later = list(open_source(tmp_path / "set", columns=Columns()).parts())[place:]
        assert [item for part in later for item in part()] == [item for part in whole[place:] for item in part()]


def test_names_that_no_file_can_have_are_told(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.png")
    names = ["a\0.png", "\ud800.png", "", "x" * 300 + ".png", "."]
    write_metadata(tmp_path / "set" / "metadata.jsonl", [{"file_name": name} for name in [*names, "a.png"]])
    with pytest.raises(DataError, match="none of 6 files is a picture that can be used"):
        ingest([tmp_path / "set"], out=tmp_path / "out")


def test_metadata_that_is_damaged_is_told(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.png")
    put(tmp_path / "set" / "metadata.parquet", b"PAR1")
    damaged, picture = items(tmp_path / "set")
    assert (damaged.problem or "").startswith("damaged behind 0 items (")
    assert picture.problem == "no row of the metadata names it"


def test_two_tables_for_the_same_pictures_are_one_line(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.png")
    for kind in ("csv", "jsonl"):
        write_metadata(tmp_path / "set" / f"metadata.{kind}", [{"file_name": "a.png"}])
    with pytest.raises(DataError, match=r"set holds both metadata.csv and metadata.jsonl; keep the one that is right"):
        open_source(tmp_path / "set", columns=Columns())


def test_parquet_of_datasets_is_read_with_the_splits_of_its_names(tmp_path: Path, picture_file: FILE) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [
        {"image": {"bytes": picture_file(number), "path": f"{number}.png"}, "text": f"{number}"} for number in range(5)
    ]
    (tmp_path / "set" / "data").mkdir(parents=True)
    whole = datasets.Dataset.from_list(rows, features=features)
    for name, first, behind in (
        ("train-00000-of-00002", 0, 2),
        ("train-00001-of-00002", 2, 3),
        ("held-00000-of-00001", 3, 5),
    ):
        whole.select(range(first, behind)).to_parquet(tmp_path / "set" / "data" / f"{name}.parquet")
    found = ours(tmp_path / "set", tmp_path / "out")
    assert found == oracle(tmp_path / "set", tmp_path / "cache")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "held": 2}


def test_a_column_that_is_misspelt_is_seen(tmp_path: Path, picture_file: FILE) -> None:
    put(tmp_path / "set" / "a.png", picture_file(1))
    write_metadata(tmp_path / "set" / "metadata.csv", [{"file_name": "a.png", "text": "red", "rights": "CC0"}])
    put(tmp_path / "other" / "b.png", picture_file(2))
    write_metadata(tmp_path / "other" / "metadata.csv", [{"file_name": "b.png", "alt": "blue", "rights": "CC0"}])

    def take(out: str, *names: str, **roles: str) -> dict[str, tuple[str, ...]]:
        columns = Columns(captions=tuple(CaptionColumn(column=name) for name in names), roles=roles)
        return ingest([tmp_path / "set", tmp_path / "other"], out=tmp_path / out, columns=columns).lacks

    with pytest.raises(DataError, match="no source has the column tekst of captions"):
        take("wrong", "tekst")
    with pytest.raises(DataError, match=r"metadata\.csv has no column licence"):
        take("wrong", "text", "alt", licence="licence")
    assert not (tmp_path / "wrong").exists()
    assert take("right", "text", "alt", "txt", licence="rights") == {"set": ("alt",), "other": ("text",)}
