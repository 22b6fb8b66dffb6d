"""A folder that says in JSON how it was made: what all such folders share.

Each file of JSON appears whole, and lies on the disk before what counts on it goes on.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mars.errors import DataError
from mars.files import whole_file


def refuse_other(folder: Path, *, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compares the settings that a folder was made with and those that are asked for, as JSON.

    Raises:
        DataError: with the first that differs.
    """
    for name in {**asked, **made}:
        there, here = made.get(name), asked.get(name)
        if there != here:
            raise DataError(
                f"{folder} was made with {name} {json.dumps(there, ensure_ascii=False)}, "
                f"got {json.dumps(here, ensure_ascii=False)}; name another folder, or remove it"
            )


def write_description(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what a folder or a shard says of itself; DataError if it cannot be written."""
    with whole_file(path, error=DataError) as partial, partial.open("wb") as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
        to_disk(file)


def read_description(path: Path) -> dict[str, Any]:
    """What a folder or a shard says of itself; DataError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {path.parent} and make it again") from error
    return found


def to_disk(file: BinaryIO) -> int:
    """Makes sure that what was written lies on the disk; returns how many bytes there are."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
