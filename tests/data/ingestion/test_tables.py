import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mars.data.ingestion.items import Item
from mars.data.ingestion.tables import require_columns, saved_tables, table_part
from mars.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"image": f"pictures/{index}.png", "text": f"a cat, {index}", "embedding": [0.5] * 8} for index in range(150)
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def delimited(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    return path


def arrow(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "t.jsonl": jsonl, "t.csv": delimited, "t.tsv": delimited, "t.parquet": parquet, "t.arrow": arrow,
}  # fmt: skip
TYPED = ["t.parquet", "t.arrow"]


def items(path: Path, *, image: str | None = None, more: dict[str, Any] | None = None) -> list[Item]:
    return list(table_part(path, name=path.name, image=image, wanted={"text"}, more=more or {})())


@pytest.mark.parametrize("name", WRITERS)
def test_every_row_of_every_kind_of_table_is_an_item(tmp_path: Path, name: str) -> None:
    found = items(WRITERS[name](tmp_path / name, ROWS), more={"split": "test"})
    assert [item.name for item in found] == [f"{name}#{number}" for number in range(1, 151)]
    assert [item.picture for item in found] == [tmp_path / row["image"] for row in ROWS]
    assert [item.fields for item in found] == [{"split": "test", "text": row["text"]} for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
def test_paths_never_leave_the_folder_of_the_table(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "set"
    inside.mkdir()
    outside = ["../a.png", "b/../../a.png", "/etc/passwd", str(tmp_path / "settings" / "a.png")]
    within = ["b/../c.png", str(inside / "d.png"), "./e.png"]
    found = items(WRITERS[name](inside / name, [{"image": one} for one in [*outside, *within]]))
    assert [item.problem for item in found[:4]] == [
        f"path outside the folder of its table ({one!r})" for one in outside
    ]
    assert [item.picture for item in found[4:]] == [inside / one for one in ("c.png", "d.png", "e.png")]


@pytest.mark.parametrize("name", WRITERS)
def test_the_column_of_pictures_is_the_one_that_was_named(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [{"image": "a.png", "second": "b.png"}])
    assert [item.picture for item in items(path)] == [tmp_path / "a.png"]
    assert [item.picture for item in items(path, image="second")] == [tmp_path / "b.png"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_without_pictures_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no column of pictures that is known; say which with --column image=NAME"):
        items(WRITERS[name](tmp_path / name, [{"text": "a cat"}]))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", *TYPED])
def test_a_column_that_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [{"image": "a.png", "text": "a cat", "long": "a black cat"}])
    assert require_columns(path, columns={"image", "text"}, captions=()) == set()
    assert require_columns(path, columns=(), captions=["long", "txt", "text"]) == {"text", "long"}
    with pytest.raises(DataError, match=f"{name} has no column caption; it has image, text, long$"):
        require_columns(path, columns={"text", "caption"}, captions=())
    with pytest.raises(DataError, match=f"{name} has no column txt or caption; it has image, .*: name that of its cap"):
        require_columns(path, columns=(), captions=["txt", "caption"])


@pytest.mark.parametrize("name", TYPED)
def test_bytes_and_structs_of_hugging_face_are_pictures(tmp_path: Path, name: str) -> None:
    struct = [{"bytes": b"A", "path": "/elsewhere/a.png"}, {"bytes": None, "path": "b.png"}, None]
    found = items(WRITERS[name](tmp_path / name, [{"image": one} for one in struct]))
    assert [item.picture for item in found] == [b"A", tmp_path / "b.png", None]
    assert found[2].problem == "no picture in its column"
    assert items(WRITERS[name](tmp_path / name, [{"jpg": b"B"}]))[0].picture == b"B"


def test_a_url_is_no_picture(tmp_path: Path) -> None:
    (found,) = items(jsonl(tmp_path / "t.jsonl", [{"image": "https://pictures.example/a.png"}]))
    assert found.problem is not None
    assert found.problem.startswith("a URL instead of a picture (https://pictures.example/a.png); download it first")


def test_lines_that_cannot_be_read_are_told_and_the_others_kept(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"image": "1.png"}', b"", b"{", b'{"image": "\xff"}', b'["a"]', b'{"image": 7}', b"  ",
             b'{"image": "8.png"}']  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    assert [(item.name, item.problem) for item in items(tmp_path / "t.jsonl")] == [
        ("t.jsonl#1", None),
        ("t.jsonl#3", "a line that is not JSON"),
        ("t.jsonl#4", "a line that is not UTF-8"),
        ("t.jsonl#5", "a line that is not a JSON object"),
        ("t.jsonl#6", "no picture in its column"),
        ("t.jsonl#8", None),
    ]


def test_rows_of_other_widths_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'image,text\r\na.png,"one,\ntwo"\r\n\r\nb.png\r\nc.png,x,y\r\nd.png,na\xefve\r\n')
    found = items(tmp_path / "t.csv")
    assert [item.problem for item in found] == [
        None,
        "a row of 1 columns instead of 2",
        "a row of 3 columns instead of 2",
        None,
    ]
    assert found[0].fields == {"text": "one,\ntwo"}


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9])
def test_a_table_that_is_cut_says_so(tmp_path: Path, name: str, part: float) -> None:
    path = WRITERS[name](tmp_path / name, [{"image": bytes([index]) * 99} for index in range(150)])
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    require_columns(path, columns={"image"}, captions=())
    *sound, last = items(path)
    assert last.problem is not None
    assert last.problem.startswith(f"damaged behind {len(sound)} items (")
    assert [item.picture for item in sound] == [bytes([index]) * 99 for index in range(len(sound))]


def test_a_parquet_file_with_wrong_pages_says_so(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", ROWS)
    content = bytearray(path.read_bytes())
    content[100:400] = b"\xff" * 300
    path.write_bytes(content)
    assert (items(path)[-1].problem or "").startswith("damaged behind ")


def test_a_data_set_in_another_order_is_refused(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"save the result of its flatten_indices\(\) instead"):
        saved_tables(tmp_path)
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(DataError, match=r"state.json is missing or damaged; save the data set again"):
        saved_tables(tmp_path)
