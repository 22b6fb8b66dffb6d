"""A picture set as a whole: how many pictures it holds, and a digest of them."""

import hashlib
import json
from pathlib import Path

from mars.data.shards import INDEX, read_pictures, shard_paths
from mars.errors import DataError
from mars.files import file_digest


def shard_digests(source: Path) -> dict[Path, str]:
    """SHA-256 of each shard, in order, which a folder of shards keeps; one tar is read whole.

    Raises:
        DataError: if there is no picture set.
    """
    digests = {}
    try:
        for shard in shard_paths(source):
            if source.is_dir():
                digests[shard] = str(json.loads(shard.with_suffix(".json").read_text("utf-8"))["sha256"])
            else:
                digests[shard] = file_digest(shard)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source} is not a whole picture set ({error}); make it again") from error
    return digests


def set_digest(source: Path) -> str:
    """SHA-256 over the digests of its shards.

    Raises:
        DataError: if there is no picture set.
    """
    return hashlib.sha256("".join(shard_digests(source).values()).encode()).hexdigest()


def set_size(source: Path) -> int:
    """How many pictures it holds; one tar is read for that."""
    if source.is_dir():
        return int(json.loads((source / INDEX).read_text("utf-8"))["pictures"])
    return sum(1 for _ in read_pictures(source))
