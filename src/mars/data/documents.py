"""Documents: texts and images in any order, images as codes. A Parquet file holds a row for each.

parts: list of { text, learned }                          or
               { role, rows, columns, codes }             role: drawn, read or source (sequence/interleaved.py)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from mars.errors import DataError
from mars.files import whole_file
from mars.sequence.interleaved import Role


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text of a document."""

    text: str
    learned: bool = True
    """Whether it is predicted, or only read."""


@dataclass(frozen=True, kw_only=True)
class CodedImage:
    """An image of a document: `codes` is (rows, columns), int32."""

    codes: npt.NDArray[np.int32]
    role: Role = "drawn"


@dataclass(frozen=True, kw_only=True)
class Document:
    """Texts and images, and where they come from."""

    key: str
    """Unique over all sources; letters, digits, `-` and `_`."""
    split: str
    """`train`, or the name of a held-out split."""
    source: str
    licence: str
    parts: tuple[Text | CodedImage, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise DataError(f"document {self.key} must hold a text or an image, got none")
        if any(isinstance(one, Text) and isinstance(other, Text) for one, other in pairwise(self.parts)):
            raise DataError(f"document {self.key} has two texts side by side; make them one")
        learned = any(isinstance(part, CodedImage) and part.role == "drawn" for part in self.parts)
        if not learned and not any(isinstance(part, Text) and part.learned for part in self.parts[1:]):
            raise DataError(f"document {self.key} must hold an image that is drawn, or a learned text after an image")

    @property
    def is_edit(self) -> bool:
        """Whether a source image is changed in it."""
        return any(isinstance(part, CodedImage) and part.role == "source" for part in self.parts)


def write_documents(path: Path, documents: Iterable[Document], *, tokenizer: str) -> int:
    """Writes a Parquet file, whole or not at all; returns how many documents it holds.

    Args:
        tokenizer: the digest of the image tokenizer that made the codes.

    Raises:
        DataError: if there is no document, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = pa.struct(
        [("text", pa.string()), ("learned", pa.bool_()), ("role", pa.string()), ("rows", pa.int16()),
         ("columns", pa.int16()), ("codes", pa.list_(pa.int16()))]
    )  # fmt: skip
    names = ("key", "split", "source", "licence")
    fields = [*((name, pa.string()) for name in names), ("parts", pa.list_(part))]
    rows = [
        {name: getattr(document, name) for name in names} | {"parts": [_row(part) for part in document.parts]}
        for document in documents
    ]
    if not rows:
        raise DataError(f"a file of documents must hold at least one, got none for {path}")
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata={"image_tokenizer": tokenizer}))
    with whole_file(path, error=DataError) as partial:
        pq.write_table(table, partial, compression="zstd", compression_level=19)
    return len(rows)


def _row(part: Text | CodedImage) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"text": part.text, "learned": part.learned}
    if part.codes.max() > np.iinfo(np.int16).max:
        raise DataError(f"codes must be below 32768 to be stored, got {part.codes.max()}")
    rows, columns = part.codes.shape
    return {"role": part.role, "rows": rows, "columns": columns, "codes": part.codes.ravel().tolist()}


def read_documents(path: Path) -> tuple[list[Document], str]:
    """All documents of a file, and the digest of the image tokenizer that made their codes.

    Raises:
        DataError: if the file is missing, damaged, or holds a document that cannot be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"no documents at {path}; make some with `mars data edits`")
    try:
        table = pq.read_table(path)
        tokenizer = (table.schema.metadata or {})[b"image_tokenizer"].decode()
        documents = [
            Document(**{**row, "parts": tuple(_part(part) for part in row["parts"])}) for row in table.to_pylist()
        ]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no file of documents ({error}); make it again") from error
    return documents, tokenizer


def _part(fields: dict[str, Any]) -> Text | CodedImage:
    if fields["text"] is not None:
        return Text(text=fields["text"], learned=bool(fields["learned"]))
    if fields["role"] not in get_args(Role):
        raise ValueError(f"an image's role is {fields['role']!r}")
    codes = np.asarray(fields["codes"], dtype=np.int32).reshape(fields["rows"], fields["columns"])
    return CodedImage(codes=codes, role=fields["role"])


class DocumentLoader:
    """Draws batches of documents, all of one layout: the same order of texts and images, of the same roles and grids.

    What a batch holds is a function of the seed and the batch's number. An epoch has each document once, but for the
    last batch of a layout, which is filled up.
    """

    def __init__(self, documents: Iterable[Document], *, seed: int) -> None:
        layouts: dict[tuple[object, ...], list[Document]] = {}
        for document in documents:
            layouts.setdefault(_layout(document), []).append(document)
        self._layouts = list(layouts.values())
        self._seed = seed
        self._epoch: tuple[tuple[int, int], list[list[Document]]] | None = None

    def __len__(self) -> int:
        """Documents in an epoch."""
        return sum(map(len, self._layouts))

    def batch(self, number: int, size: int, *, rank: int = 0, ranks: int = 1) -> list[Document]:
        """The documents of a batch; of several processes, number `rank` takes every `ranks`-th."""
        epoch, place = divmod(number, sum(-(-len(layout) // size) for layout in self._layouts))
        if self._epoch is None or self._epoch[0] != (epoch, size):
            self._epoch = (epoch, size), self._batches(epoch, size)
        return self._epoch[1][place][rank::ranks]

    def _batches(self, epoch: int, size: int) -> list[list[Document]]:
        generator, batches = np.random.default_rng((self._seed, epoch)), list[list[Document]]()
        for layout in self._layouts:
            order = np.resize(generator.permutation(len(layout)), (-(-len(layout) // size), size))
            batches += [[layout[index] for index in chosen] for chosen in order]
        return [batches[index] for index in generator.permutation(len(batches))]


def _layout(document: Document) -> tuple[object, ...]:
    return tuple("text" if isinstance(part, Text) else (part.role, part.codes.shape) for part in document.parts)


def read_all_documents(paths: Sequence[Path]) -> tuple[list[Document], str]:
    """The documents of several files, and the digest of the image tokenizer that all of them share.

    Raises:
        DataError: if a file cannot be read, or their image tokenizers differ.
    """
    documents: list[Document] = []
    digests = set()
    for path in paths:
        found, digest = read_documents(path)
        documents += found
        digests.add(digest)
    if len(digests) != 1:
        raise DataError(f"documents must come from one image tokenizer, got {len(digests)}: make them again")
    return documents, digests.pop()
