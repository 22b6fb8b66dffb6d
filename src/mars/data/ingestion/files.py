"""Folders of picture files with text beside them, and tars in WebDataset's layout."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mars.data.ingestion.decoding import MAX_BYTES
from mars.data.ingestion.items import METADATA, PICTURE_SUFFIXES, TEXT_SUFFIXES, Item, Part, guarded, suffix_of
from mars.errors import DataError

_END_MARK = 1024
"""Zeros at the end of a tar."""


def files_below(folder: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder (as `a/b/`) with its visible files, by name; memory grows with the largest folder only.

    A link to a file is a file; a link to a folder stands among the files, since following it may never end.

    Raises:
        DataError: if a folder cannot be read.
    """
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / below), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"{folder / below} cannot be read ({error.strerror}); allow it or leave it out") from None
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        folders = [entry.name for entry in visible if entry.is_dir(follow_symlinks=False)]
        waiting += [f"{below}{name}/" for name in reversed(folders)]
        yield below, [entry for entry in visible if not entry.is_dir(follow_symlinks=False)]


def folder_parts(root: Path) -> Iterator[Part]:
    """The folders of a tree of picture files, each a part."""

    def part(below: str, entries: list[os.DirEntry[str]]) -> Part:
        return lambda: pictures_of(below, entries)

    for below, entries in files_below(root):
        if entries:
            yield part(below, entries)


def pictures_of(below: str, entries: list[os.DirEntry[str]]) -> Iterator[Item]:
    """The pictures of one folder with the texts beside them, by name."""
    texts: dict[str, dict[str, bytes | Path]] = {}
    pictures = set()
    for entry in entries:
        stem, suffix = Path(entry.name).stem, suffix_of(entry.name)
        if suffix in TEXT_SUFFIXES:
            texts.setdefault(stem, {})[suffix] = Path(entry.path)
        else:
            pictures.add(stem)
    for entry in entries:
        name, stem, suffix = below + entry.name, Path(entry.name).stem, suffix_of(entry.name)
        if suffix in TEXT_SUFFIXES:
            if stem not in pictures:
                yield Item(name=name, problem="no picture of this name")
        elif not entry.is_file():
            yield Item(name=name, problem="not a file (or a link to a folder or to nothing)")
        elif entry.name in METADATA:
            yield Item(name=name, problem="metadata without a column file_name")
        elif suffix and suffix not in PICTURE_SUFFIXES:
            yield Item(name=name, problem=f"not a picture of a kind that is read (.{suffix})")
        else:
            yield Item(name=name, picture=Path(entry.path), texts=texts.get(stem, {}))


def tar_part(path: Path, *, name: str, image: str | None) -> Part:
    """The samples of a tar: neighbours whose names are the same up to the first dot of the file's name.

    Args:
        name: of the tar, which the names of its items begin with.
        image: the suffix of pictures; None takes what is one.
    """
    damage = (tarfile.TarError, EOFError, zlib.error, OSError)
    return guarded(lambda: _samples(path, name=name, image=image), name=name, damage=damage)


def _samples(path: Path, *, name: str, image: str | None) -> Iterator[Item]:
    seen = set[bytes]()
    with tarfile.open(path, "r:*") as tar:
        sample, members = "", dict[str, bytes | None]()
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined] # memory must not grow with the tar
            folder, _, file = member.name.rpartition("/")
            if not member.isfile() or file.startswith("."):
                continue
            stem, _, suffix = file.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if members and (key != sample or suffix in members):
                yield _sample(f"{name}/{sample}", members, image=image, seen=seen)
                members = {}
            sample = key
            wanted = suffix == image or suffix_of(file) in (
                TEXT_SUFFIXES if image else PICTURE_SUFFIXES | TEXT_SUFFIXES
            )
            read = tar.extractfile(member) if wanted and member.size <= MAX_BYTES else None
            members[suffix] = read.read() if read else None
        if members:
            yield _sample(f"{name}/{sample}", members, image=image, seen=seen)
        if not _has_end_mark(path):
            raise tarfile.ReadError("its end is missing")


def _sample(name: str, members: dict[str, bytes | None], *, image: str | None, seen: set[bytes]) -> Item:
    short = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    repeated = short in seen
    seen.add(short)
    texts = {suffix: content or b"" for suffix, content in members.items() if suffix_of(f"x.{suffix}") in TEXT_SUFFIXES}
    pictures = [one for one in members if (one == image if image else suffix_of(f"x.{one}") in PICTURE_SUFFIXES)]
    if repeated:
        return Item(name=name, problem="duplicate key")
    if not pictures:
        return Item(name=name, problem="no picture of this name")
    if len(pictures) > 1:
        several = ", ".join(pictures)
        return Item(name=name, problem=f"several pictures of this name ({several}); choose by --column image=SUFFIX")
    if (picture := members[pictures[0]]) is None:
        return Item(name=name, problem=f"too many bytes (at most {MAX_BYTES:,})")
    return Item(name=name, picture=picture, texts=texts)


def _has_end_mark(path: Path) -> bool:
    """Where a tar is not compressed: one that is cut between two members reads like a shorter one."""
    with path.open("rb") as file:
        if file.read(262)[257:] != b"ustar":
            return True
        file.seek(-_END_MARK, os.SEEK_END)
        return not any(file.read())
