"""Lists of pictures that must go, as of people who do not want theirs used."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mars.data.curation.duplicates import HammingIndex
from mars.data.shards import Picture
from mars.errors import DataError

_SHA256, _HASH = re.compile(r"[0-9a-f]{64}", re.ASCII), re.compile(r"[0-9a-f]{16}", re.ASCII)


class RemovalList:
    """Entries of files, one a line: a key, a URL, the SHA-256 of a file, or a perceptual hash (64 and 16 hex digits).

    Lines that begin with # are remarks. Pictures near a listed hash go too.

    Raises:
        DataError: if a file cannot be read as text.
    """

    def __init__(self, files: Iterable[Path], *, distance: int) -> None:
        self._entries: dict[str, str] = {}
        """To the name of the list."""
        hashes = []
        for file in files:
            for entry in _lines(file):
                self._entries.setdefault(entry, file.name)
                if _HASH.fullmatch(entry):
                    hashes.append(entry)
        self._hashes = hashes
        self._index = HammingIndex(np.array([int(one, 16) for one in hashes], dtype=np.uint64), distance=distance)

    def match(self, picture: Picture) -> str | None:
        """The entry and list that name the picture by key, URL or content; None when none does."""
        record = picture.record
        digest = hashlib.sha256(picture.content).hexdigest() if self._entries else ""
        for name in (record.key, record.url, digest):
            if name and name in self._entries:
                return f"{name} in {self._entries[name]}"
        return None

    def match_hash(self, found: int) -> str | None:
        """The listed hash near this one, and its list."""
        near = self._index.near(found) if self._hashes else ()
        for position in near:
            entry = self._hashes[position]
            return f"{entry} in {self._entries[entry]}"
        return None


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} must be a list of what to remove, one entry a line, got: {error}") from None
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [
        entry.lower() if _SHA256.fullmatch(entry.lower()) or _HASH.fullmatch(entry.lower()) else entry
        for entry in entries
    ]
