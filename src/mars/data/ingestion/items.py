"""What a source is made of: parts, and items in them, always in the same order.

A run that was stopped goes on at part p, item i. What cannot be used is an item too, with its problem: nothing is left
out in silence. Items hold names and bytes; `records.py` looks at what is in them.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mars.errors import DataError

PICTURE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff"})
TEXT_SUFFIXES = frozenset({"txt", "caption", "json"})
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables beside pictures, as Hugging Face `datasets` calls them."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture as it was found."""

    name: str
    """Where, below its source; no other item of the source has it, or `problem` says so."""
    picture: bytes | Path | None = None
    texts: Mapping[str, bytes | Path] = field(default_factory=dict)
    """What stands beside it, by suffix, not yet read: JSON objects where that ends in `json`, else one text."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What a table says of it, by column."""
    problem: str | None = None
    """Why it cannot be used."""


Part = Callable[[], Iterator[Item]]


def suffix_of(name: str) -> str:
    """The lower-case letters behind the last dot; none without one."""
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122 - a name, not a path


def guarded(read: Part, *, name: str, damage: tuple[type[Exception], ...]) -> Part:
    """A part whose last item, where its file is damaged, says so, instead of ending the run.

    Args:
        damage: errors that mean that the file is damaged.

    The part raises DataError where the machine, not the file, is at fault: the run can go on later.
    """

    def items() -> Iterator[Item]:
        count = 0
        try:
            for item in read():
                yield item
                count += 1
        except damage as error:
            if isinstance(error, OSError) and error.errno:
                raise DataError(f"{name} cannot be read ({error.strerror}); run the same command again") from error
            words = " ".join(str(error).split())[:200]
            yield Item(name=name, problem=f"damaged behind {count:,} items ({words})")

    return items
