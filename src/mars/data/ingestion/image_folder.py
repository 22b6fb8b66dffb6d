"""Folders in the layout `imagefolder` of Hugging Face `datasets`: a table beside pictures has a row for each of them.

Its column `file_name` names the picture, relative to the table's folder; `mask_file_name` and the like name others of
the same row. A picture below such a table that no row names is refused, since `datasets` leaves it out too.
"""

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

from mars.data.ingestion.files import files_below, pictures_of
from mars.data.ingestion.items import METADATA, TEXT_SUFFIXES, Item, Part
from mars.data.ingestion.records import Columns
from mars.data.ingestion.tables import head_of, split_of, table_part
from mars.errors import DataError

_NAME = "file_name"


def metadata_tables(tables: Sequence[Path]) -> list[Path]:
    """Those of the tables that name pictures beside them.

    Raises:
        DataError: if a folder has two.
    """
    found = [path for path in tables if path.name in METADATA and _columns_of_files(path)]
    for one, next_one in pairwise(found):
        if one.parent == next_one.parent:
            raise DataError(f"{one.parent} holds both {one.name} and {next_one.name}; keep the one that is right")
    return found


def _columns_of_files(path: Path) -> list[str]:
    """The columns that name files; a table that is damaged is told when it is read."""
    try:
        head = head_of(path)
    except (OSError, ValueError, csv.Error):
        return [_NAME]
    return [name for name in head if name == _NAME or name.endswith(f"_{_NAME}")]


class ImageFolder:
    """The rows of each table with the texts beside their pictures, then what no row names, folder by folder.

    Memory grows with the number of names in the tables: about 100 bytes each.

    Raises:
        DataError: if a table names several files in a row, and it is not said which of them is the picture.
    """

    def __init__(self, root: Path, tables: Sequence[Path], *, columns: Columns) -> None:
        self.root, self.columns = root, columns
        self._names = {path: path.relative_to(root).as_posix() for path in tables}
        self._pictures = {path: _picture_column(path, asked=columns.roles.get("image")) for path in tables}
        self._governed = tuple(name.removesuffix(path.name) for path, name in self._names.items())
        """Folders, as `a/b/`, in which rows say what is a picture."""

    def parts(self) -> Iterator[Part]:
        """A part for each table and for each folder."""
        for path in self._names:
            yield partial(self._rows, path)
        for below, entries in files_below(self.root):
            if entries:
                yield partial(self._rest, below, entries)

    def _rows(self, path: Path) -> Iterator[Item]:
        name, image = self._names[path], self._pictures[path]
        for item in table_part(path, name=name, image=image, wanted=self.columns.wanted, more=split_of(name))():
            yield replace(item, texts=_beside(item.picture)) if isinstance(item.picture, Path) else item

    def _rest(self, below: str, entries: list["os.DirEntry[str]"]) -> Iterator[Item]:
        for item in pictures_of(below, entries):
            if _short(item.name) in self._named:
                continue
            if item.problem is None and below.startswith(self._governed):
                item = Item(name=item.name, problem="no row of the metadata names it")
            yield item

    @cached_property
    def _named(self) -> set[bytes]:
        """The tables, and all files that they name; read anew by a run that goes on behind their rows."""
        found = {_short(name) for name in self._names.values()}
        for path, image in self._pictures.items():
            for column in {image, *_columns_of_files(path)}:
                for item in table_part(path, name=path.name, image=column, wanted=(), more={})():
                    if isinstance(item.picture, Path):
                        found.add(_short(item.picture.relative_to(self.root).as_posix()))
        return found


def _picture_column(path: Path, *, asked: str | None) -> str:
    names = _columns_of_files(path)
    if asked in names:
        return str(asked)
    if _NAME not in names and len(names) > 1:
        raise DataError(f"{path} names several files in a row; say which is the picture: --column image={names[0]}")
    return _NAME if _NAME in names else names[0]


def _beside(picture: Path) -> dict[str, bytes | Path]:
    places = {suffix: picture.with_suffix(f".{suffix}") for suffix in sorted(TEXT_SUFFIXES)}
    return {suffix: place for suffix, place in places.items() if os.path.isfile(place)}  # noqa: PTH113 - never raises


def _short(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
