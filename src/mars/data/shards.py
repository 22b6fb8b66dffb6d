"""What lies on disk: picture shards (WebDataset tar) and code shards (Parquet).

A picture shard holds `KEY.png` and `KEY.json` per picture, as `webdataset`, `datasets` and Ray Data read
them. A code shard is what training reads: the codes of a picture instead of its pixels, with the same
captions.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mars.errors import DataError
from mars.files import whole_file


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One text about a picture."""

    text: str
    language: str
    """`en` or `zh`."""
    kind: str
    """`name`, `style`, `tags`, `scene`, or `paraphrase` (never trained on)."""


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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A record with its pixels, as PNG bytes."""

    record: Record
    png: bytes

    def pixels(self) -> npt.NDArray[np.uint8]:
        """(height, width, 3) red, green, blue, writable.

        Raises:
            DataError: if the PNG is damaged.
        """
        try:
            return np.array(Image.open(io.BytesIO(self.png)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"picture {self.record.key} is damaged ({error}); make its shard again") from error


@dataclass(frozen=True, kw_only=True)
class CodedPicture:
    """A record with its codes: `codes` is (rows, columns), int32."""

    record: Record
    codes: npt.NDArray[np.int32]


def _record(fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise TypeError("a record is not an object")
    captions = tuple(Caption(**caption) for caption in fields.pop("captions"))
    return Record(captions=captions, **fields)


def write_pictures(path: Path, pictures: Iterable[Picture]) -> int:
    """Writes a WebDataset tar shard, which appears only when whole; returns how many pictures it holds."""
    count = 0
    with whole_file(path, error=DataError) as partial, tarfile.open(partial, "w") as tar:
        for picture in pictures:
            meta = json.dumps(asdict(picture.record), ensure_ascii=False).encode()
            for suffix, content in (("png", picture.png), ("json", meta)):
                member = tarfile.TarInfo(f"{picture.record.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            count += 1
    return count


def read_pictures(path: Path) -> Iterator[Picture]:
    """Reads a WebDataset tar shard written by `write_pictures`.

    Raises:
        DataError: if the file is missing, is no tar, or a picture lacks its record.
    """
    if not path.is_file():
        raise DataError(f"no picture shard at {path}; make it with `mars data emoji` or `mars data scenes`")
    try:
        with tarfile.open(path, "r:") as tar:
            key, png = "", None
            for member in tar:
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if png is None and member.name.endswith(".png"):
                    key, png = member.name.removesuffix(".png"), content
                elif png is not None and member.name == f"{key}.json":
                    yield Picture(record=_record(json.loads(content)), png=png)
                    png = None
                else:
                    raise ValueError(f"{member.name} does not belong behind what precedes it")
        if png is not None:
            raise ValueError(f"{key}.png has no record")
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
    table = pa.Table.from_pylist(rows)
    codes = table.schema.get_field_index("codes")
    table = table.set_column(codes, "codes", table["codes"].cast(pa.list_(pa.int16())))
    table = table.replace_schema_metadata({"image_tokenizer": tokenizer})
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
            coded.append(CodedPicture(record=_record(row), codes=codes))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a code shard ({error}); make it with `mars data encode`") from error
    return coded, tokenizer
