"""What lies at a path that somebody names, found out by looking."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mars.data.ingestion.files import files_below, folder_parts, tar_part
from mars.data.ingestion.image_folder import ImageFolder, metadata_tables
from mars.data.ingestion.items import PICTURE_SUFFIXES, TEXT_SUFFIXES, Part, suffix_of
from mars.data.ingestion.records import Columns
from mars.data.ingestion.tables import TABLE_SUFFIXES, require_columns, saved_tables, split_of, table_part
from mars.errors import DataError

_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures of one origin."""

    name: str
    parts: Callable[[], Iterator[Part]]
    listing: str
    """A digest of the names and sizes of its files: a run goes on only where it is the same."""
    lacks: tuple[str, ...] = ()
    """Columns of captions that were named and that its tables do not have."""


def open_source(path: Path, *, columns: Columns) -> Source:
    """Finds out what lies at `path`; nothing but names and the heads of tables is read.

    It is a table, a tar, a folder of tables or of tars at any depth, a folder that Hugging Face `datasets` saved to
    disk, or a folder of picture files with text or tables of metadata beside them.

    Raises:
        DataError: if it is none of these, or more than one, or lacks a column that was named, or all those of captions.
    """
    path = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - links keep the names that people gave them
    listing = hashlib.sha256()
    found: dict[str, list[Path]] = {"tar": [], "table": []}
    pictures = others = 0
    for below, entries in files_below(path) if path.is_dir() else [("", [_entry(path)])]:
        for entry in entries:
            listing.update(os.fsencode(f"{below}{entry.name}") + b"\0%d\n" % _size(entry))
            if kind := _kind(entry.name):
                found[kind].append(Path(entry.path))
            pictures += suffix_of(entry.name) in PICTURE_SUFFIXES
            others += 1
    describe = partial(Source, name=path.name, listing=listing.hexdigest())
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _tables(describe, list(saved_tables(path)), root=path, columns=columns)
    if path.is_dir() and pictures and found["tar"]:
        raise DataError(f"{path} holds both pictures and tars ({found['tar'][0].name}); name the one or the other")
    if found["tar"]:
        return describe(parts=lambda: (_tar(each, root=path, columns=columns) for each in found["tar"]))
    if found["table"] and not pictures:
        tables = [(each, split_of(_below(each, path)) if each != path else {}) for each in found["table"]]
        return _tables(describe, tables, root=path, columns=columns)
    if metadata := metadata_tables(found["table"]):
        return _image_folder(describe, metadata, root=path, columns=columns)
    if path.is_dir() and others:
        return describe(parts=lambda: folder_parts(path))
    what = "is empty" if path.is_dir() else "is neither a tar nor a table"
    raise DataError(f"{path} {what}; name a folder of pictures, WebDataset tars, or a JSONL, CSV or Parquet file")


def _entry(path: Path) -> "os.DirEntry[str]":
    """What its folder says of a file."""
    try:
        with os.scandir(path.parent) as entries:
            for entry in entries:
                if entry.name == path.name:
                    return entry
    except OSError:
        pass
    raise DataError(f"nothing is at {path}; name a folder or file of pictures that exists")


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing
        return 0


def _kind(name: str) -> str | None:
    if name.lower().endswith(_TARS):
        return "tar"
    return "table" if suffix_of(name) in TABLE_SUFFIXES else None


def _below(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _tar(path: Path, *, root: Path, columns: Columns) -> Part:
    return tar_part(path, name=_below(path, root), image=columns.roles.get("image"))


def _image_folder(describe: Callable[..., Source], tables: list[Path], *, root: Path, columns: Columns) -> Source:
    """Captions may also be texts beside the pictures."""
    folder, there = ImageFolder(root, tables, columns=columns), {*TEXT_SUFFIXES}
    required = [name for name in columns.required if name != columns.roles.get("image")]
    for path in tables:
        there |= require_columns(path, columns=required, captions=columns.caption_names, may_lack_captions=True)
    return describe(parts=folder.parts, lacks=tuple(name for name in columns.caption_names if name not in there))


def _tables(
    describe: Callable[..., Source], tables: list[tuple[Path, dict[str, Any]]], *, root: Path, columns: Columns
) -> Source:
    there = set[str]()
    for path, _ in tables:
        there |= require_columns(path, columns=columns.required, captions=columns.caption_names)

    def parts() -> Iterator[Part]:
        image = columns.roles.get("image")
        for path, more in tables:
            yield table_part(path, name=_below(path, root), image=image, wanted=columns.wanted, more=more)

    return describe(parts=parts, lacks=tuple(name for name in columns.caption_names if name not in there))
