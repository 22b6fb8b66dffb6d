"""Tables with a row per picture: JSON lines, CSV, Parquet, and the Arrow files of Hugging Face `datasets`.

The picture is bytes, the path of a file in the table's folder, or both as `{"bytes": ..., "path": ...}`.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Collection, Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mars.data.ingestion.items import Item, Part, guarded, suffix_of
from mars.errors import DataError

TABLE_SUFFIXES = frozenset({"jsonl", "ndjson", "csv", "tsv", "parquet", "arrow"})
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_path", "file_name", "filename", "path", "file")
"""Taken in this order where no column was named."""
Rows = Generator[dict[str, Any] | str, None, None]
"""Rows of a table, or why one cannot be used."""
_BLANK = ""
"""In place of a row: nothing is there."""
_ROWS = 64
"""Of an Arrow table in memory as Python objects."""
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\b.*")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names, and the splits that they mean: `data_files.py` of `datasets`."""


def table_part(path: Path, *, name: str, image: str | None, wanted: Collection[str], more: dict[str, Any]) -> Part:
    """The rows of a table.

    Args:
        image: the column of pictures; None looks for one of `IMAGE_COLUMNS`.
        wanted: columns that are read, where they are there.
        more: what is known of every row.

    Raises:
        DataError: from the part, if there is no such column.
    """
    import pyarrow as pa

    def items() -> Iterator[Item]:
        column = image
        for number, row in enumerate(_rows(path, wanted={*wanted, *((image,) if image else IMAGE_COLUMNS)}), 1):
            row_name = f"{name}#{number}"
            if isinstance(row, str):
                if row != _BLANK:
                    yield Item(name=row_name, problem=row)
                continue
            column = column or _image_column(row, path=path)
            fields = {**more, **{key: value for key, value in row.items() if key in wanted}}
            try:
                yield Item(name=row_name, picture=_picture(row.get(column), folder=path.parent), fields=fields)
            except DataError as error:
                yield Item(name=row_name, problem=str(error))

    return guarded(items, name=name, damage=(pa.ArrowException, csv.Error, ValueError, OSError))


def _image_column(row: dict[str, Any], *, path: Path) -> str:
    for name in IMAGE_COLUMNS:
        if name in row:
            return name
    raise DataError(f"{path} has no column of pictures that is known; say which with --column image=NAME")


def require_columns(
    path: Path, *, columns: Collection[str], captions: Collection[str], may_lack_captions: bool = False
) -> set[str]:
    """Looks at the head of a table for columns that were named.

    Args:
        columns: all of which must be there.
        captions: one of which must be there, if any is named, unless `may_lack_captions`.

    Returns:
        The `captions` that are there; of JSON lines, where every row may have other columns, and of a table that is
        damaged, which is told when it is read, all of them.

    Raises:
        DataError: if something is not there.
    """
    try:
        found = _columns(path)
    except (OSError, ValueError, csv.Error):
        found = []
    if not found:
        return {*captions}
    if missing := sorted(set(columns) - set(found)):
        raise DataError(f"{path} has no column {missing[0]}; it has {', '.join(found)}")
    there = set(captions) & set(found)
    if captions and not there and not may_lack_captions:
        raise DataError(
            f"{path} has no column {' or '.join(captions)}; it has {', '.join(found)}: name that of its captions too, "
            "with --caption"
        )
    return there


def _columns(path: Path) -> list[str]:
    """None of JSON lines."""
    match suffix_of(path.name):
        case "parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(path).names)
        case "arrow":
            return list(_arrow_reader(path).schema.names)
        case "csv" | "tsv":
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                return next(csv.reader(file, delimiter=_delimiter(path)), [])
        case _:
            return []


def head_of(path: Path) -> list[str]:
    """The columns of a table; of JSON lines those of the first row.

    Raises:
        OSError, ValueError, csv.Error: if it cannot be read.
    """
    if found := _columns(path):
        return found
    rows = _rows(path, wanted=set())
    try:
        return list(next((row for row in rows if isinstance(row, dict)), {}))
    finally:
        rows.close()


def split_of(name: str) -> dict[str, str]:
    """The split of a table's rows as a field of theirs, where the table's name below its source says one.

    `data/NAME-00000-of-00012.parquet` is of the split NAME; else the first word of its folders, then of its own name,
    that means a split decides.
    """
    folders, _, file = name.rpartition("/")
    if shard := _SHARD.fullmatch(file):
        return {"split": shard[1]}
    for word in re.split(r"[-._ 0-9/]+", f"{folders}/{file}"):
        if word in _SPLITS:
            return {"split": _SPLITS[word]}
    return {}


def _picture(value: Any, *, folder: Path) -> bytes | Path:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError("no picture in its column")
    if "://" in value:
        raise DataError(f"a URL instead of a picture ({value[:100]}); download it first, as with img2dataset")
    folder = Path(os.path.normpath(folder.absolute()))
    path = Path(os.path.normpath(folder / value))
    if not path.is_relative_to(folder) or "\0" in value:
        raise DataError(f"path outside the folder of its table ({value[:100]!r})")
    return path


def _rows(path: Path, *, wanted: set[str]) -> Rows:
    """The rows of any table; `wanted` saves reading other columns where that can be saved."""
    match suffix_of(path.name):
        case "parquet":
            return _parquet_rows(path, wanted=wanted)
        case "arrow":
            return _arrow_rows(path, wanted=wanted)
        case "csv" | "tsv":
            return _csv_rows(path)
        case _:
            return _json_rows(path)


def _json_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                yield _BLANK
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield "a line that is not UTF-8"
            except (ValueError, RecursionError):
                yield "a line that is not JSON"
            else:
                yield row if isinstance(row, dict) else "a line that is not a JSON object"


def _delimiter(path: Path) -> str:
    return "\t" if suffix_of(path.name) == "tsv" else ","


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize >> 32)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=_delimiter(path))
        names = next(rows, [])
        for row in rows:
            if not row:
                yield _BLANK
            elif len(row) != len(names):
                yield f"a row of {len(row)} columns instead of {len(names)}"
            else:
                yield dict(zip(names, row, strict=True))


def _parquet_rows(path: Path, *, wanted: set[str]) -> Rows:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(batch_size=_ROWS, columns=names):
            yield from batch.to_pylist()


def _arrow_reader(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path)))


def _arrow_rows(path: Path, *, wanted: set[str]) -> Rows:
    for batch in _arrow_reader(path):
        chosen = batch.select([name for name in batch.schema.names if name in wanted])
        for start in range(0, chosen.num_rows, _ROWS):
            yield from chosen.slice(start, _ROWS).to_pylist()


def saved_tables(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """The Arrow files of a data set, or of its splits, that `datasets` saved to disk, and what is known of their rows.

    Raises:
        DataError: if a file that says so cannot be read, or the rows stand in another order than their files.
    """
    whole = folder / "dataset_dict.json"
    if whole.is_file():
        splits = _described(whole).get("splits", [])
        return chain.from_iterable(
            ((path, {"split": split}) for path, _ in saved_tables(folder / str(split))) for split in splits
        )
    state = _described(folder / "state.json")
    if state.get("_indices_files"):
        raise DataError(f"{folder} holds rows in another order; save the result of its flatten_indices() instead")
    return [(folder / str(file["filename"]), {}) for file in state.get("_data_files", [])]


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError):
        raise DataError(f"{path} is missing or damaged; save the data set again") from None
    return found
