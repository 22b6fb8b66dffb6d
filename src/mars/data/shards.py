"""What lies on disk: picture shards (WebDataset tar) and code shards (Parquet).

A picture shard holds a picture (`KEY.png`, `KEY.jpg` or `KEY.webp`) and its record (`KEY.json`) per key, as
`webdataset`, `datasets` and Ray Data read them; the shards of a large set lie in a folder (`data/shard_folder.py`). A
code shard is what training reads: the codes of a picture instead of its pixels, with the same captions.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from mars.errors import DataError
from mars.files import whole_file

Kind = Literal["name", "style", "request", "tags", "scene", "paraphrase", "original", "dense", "translated"]
"""What a caption is: `paraphrase` is never trained on, `original` came with the picture, `dense` tells all of it."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Suffix = Literal["png", "jpg", "webp"]
SUFFIXES: tuple[Suffix, ...] = get_args(Suffix)
INDEX = "dataset.json"
"""What a folder of shards is known by: its settings, and whether it is finished."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One text about a picture."""

    text: str
    language: str
    """ISO 639-1, as `en` or `zh`; `und` where nobody said."""
    kind: str
    """One of `KINDS`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a picture apart from its pixels."""

    key: str
    """Unique over all sources; letters, digits, `-` and `_`."""
    concept: str
    """What it shows, the same for every style of one thing."""
    style: str
    split: str
    """`train`, or the name of a held-out split."""
    source: str
    licence: str
    captions: tuple[Caption, ...]
    width: int | None = None
    """Pixels of the stored picture; null where nobody looked."""
    height: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """By the name of the scorer."""
    url: str | None = None
    """Where the picture was found."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A record with its picture, as the bytes of a file."""

    record: Record
    content: bytes
    suffix: Suffix = "png"
    """What the bytes are."""

    def pixels(self) -> npt.NDArray[np.uint8]:
        """(height, width, 3) red, green, blue, writable.

        Raises:
            DataError: if the picture is damaged.
        """
        try:
            return np.array(Image.open(io.BytesIO(self.content)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"picture {self.record.key} is damaged ({error}); make its shard again") from error


@dataclass(frozen=True, kw_only=True)
class CodedPicture:
    """A record with its codes: `codes` is (rows, columns), int32."""

    record: Record
    codes: npt.NDArray[np.int32]


def _record(values: Any) -> Record:
    if not isinstance(values, dict):
        raise TypeError("a record is not an object")
    captions = tuple(Caption(**caption) for caption in values.pop("captions"))
    return Record(captions=captions, **values)


def add_picture(tar: tarfile.TarFile, picture: Picture) -> None:
    """Adds one picture to a tar: the same picture gives the same bytes, whoever writes them and when."""
    meta = json.dumps(asdict(picture.record), ensure_ascii=False).encode()
    for suffix, content in ((picture.suffix, picture.content), ("json", meta)):
        member = tarfile.TarInfo(f"{picture.record.key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    tar.members.clear()  # type: ignore[attr-defined] # memory must not grow with the data


def write_pictures(path: Path, pictures: Iterable[Picture]) -> int:
    """Writes a WebDataset tar shard, which appears only when whole; returns how many pictures it holds."""
    count = 0
    with whole_file(path, error=DataError) as partial, tarfile.open(partial, "w") as tar:
        for picture in pictures:
            add_picture(tar, picture)
            count += 1
    return count


def shard_paths(path: Path) -> list[Path]:
    """The picture shards at `path`, in order: the one tar, or those of a finished folder.

    Raises:
        DataError: if nothing is there, or a folder that is no set of shards or not finished.
    """
    if not path.is_dir():
        if path.is_file():
            return [path]
        raise DataError(f"no picture shard at {path}; make it with `mars data ingest`, `emoji` or `scenes`")
    try:
        index = json.loads((path / INDEX).read_text("utf-8"))
        finished, shards = bool(index["finished"]), [path / name for name in index["shards"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(
            f"{path} is not a folder of shards: it has no {INDEX}; make it with `mars data ingest`"
        ) from None
    if not finished:
        raise DataError(f"{path} is not finished; run the command that makes it again, and it continues")
    return shards


def read_pictures(path: Path) -> Iterator[Picture]:
    """Reads the pictures of a WebDataset tar written by `write_pictures`, or of a folder of them (`shard_paths`).

    Raises:
        DataError: if the file is missing, is no tar, or a picture lacks its record.
    """
    for shard in shard_paths(path):
        yield from _read_shard(shard)


def _read_shard(path: Path) -> Iterator[Picture]:
    try:
        with tarfile.open(path, "r:") as tar:
            waiting: tuple[str, Suffix, bytes] | None = None
            for member in tar:
                file = tar.extractfile(member)
                content = file.read() if file else b""
                tar.members.clear()  # type: ignore[attr-defined] # memory must not grow with the shard
                key, _, suffix = member.name.rpartition(".")
                if waiting is None and suffix in SUFFIXES:
                    waiting = key, suffix, content
                elif waiting is not None and member.name == f"{waiting[0]}.json":
                    yield Picture(record=_record(json.loads(content)), content=waiting[2], suffix=waiting[1])
                    waiting = None
                else:
                    raise ValueError(f"{member.name} does not belong behind what precedes it")
        if waiting is not None:
            raise ValueError(f"{waiting[0]}.{waiting[1]} has no record")
        if not _ends_with_zeros(path):
            raise ValueError("it was cut short")
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a picture shard ({error}); make it again") from error


def _ends_with_zeros(path: Path) -> bool:
    """Whether the end mark of a tar is there: a file cut between two members reads like a shorter shard."""
    with path.open("rb") as file:
        file.seek(-1024, os.SEEK_END)
        return not any(file.read())


def write_codes(path: Path, coded: Iterable[CodedPicture], *, tokenizer: str) -> int:
    """Writes a Parquet code shard; `tokenizer` is the digest of the image tokenizer that made the codes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, pixels = pa.string(), pa.int64(), pa.int32()
    caption = pa.struct([(name, text) for name in ("text", "language", "kind")])
    known = {"captions": pa.list_(caption), "width": pixels, "height": pixels, "scores": pa.map_(text, pa.float64())}
    schema = pa.schema(
        [(each.name, known.get(each.name, text)) for each in fields(Record)]
        + [("rows", number), ("columns", number), ("codes", pa.list_(pa.int16()))],
        metadata={"image_tokenizer": tokenizer},
    )
    rows = []
    for item in coded:
        row = asdict(item.record)
        row["rows"], row["columns"] = item.codes.shape
        if item.codes.max() > np.iinfo(np.int16).max:
            raise DataError(f"codes must be below 32768 to be stored, got {item.codes.max()}")
        row["codes"] = item.codes.astype(np.int16).ravel().tolist()
        rows.append(row)
    if not rows:
        raise DataError(f"a code shard must hold at least one picture, got none for {path}")
    table = pa.Table.from_pylist(rows, schema=schema)
    with whole_file(path, error=DataError) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)
    return len(rows)


def read_codes(path: Path) -> tuple[list[CodedPicture], str]:
    """Reads a code shard: its pictures, and the digest of the image tokenizer that made the codes.

    Raises:
        DataError: if the file is missing or is no code shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"no code shard at {path}; make it with `mars data encode`")
    try:
        table = pq.read_table(path)
        tokenizer = (table.schema.metadata or {})[b"image_tokenizer"].decode()
        coded = []
        for row in table.to_pylist():
            shape = (row.pop("rows"), row.pop("columns"))
            codes = np.asarray(row.pop("codes"), dtype=np.int32).reshape(shape)
            row["scores"] = dict(row.get("scores") or ())
            coded.append(CodedPicture(record=_record(row), codes=codes))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a code shard ({error}); make it with `mars data encode`") from error
    return coded, tokenizer
