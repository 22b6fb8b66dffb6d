"""Pictures to codes, so that training never runs the image tokenizer."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mars.data.shards import CodedPicture, Picture, read_pictures, write_codes
from mars.errors import DataError
from mars.image_tokenizer.model import ImageTokenizer

BATCH = 64


@torch.inference_mode()
def _encode(tokenizer: ImageTokenizer, pictures: list[Picture], sizes: set[tuple[int, ...]]) -> list[CodedPicture]:
    """Codes of one batch; `sizes` collects the sizes seen so far."""
    pixels = [picture.pixels() for picture in pictures]
    sizes.update(one.shape for one in pixels)
    if len(sizes) > 1:
        raise DataError(f"pictures of a shard must share one size, got several near {pictures[0].record.key}")
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    codes = tokenizer.encode(images).numpy().astype(np.int32)
    return [CodedPicture(record=picture.record, codes=one) for picture, one in zip(pictures, codes, strict=True)]


def encode_pictures(
    shard: Path,
    *,
    tokenizer: ImageTokenizer,
    digest: str,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes the code shard of a picture shard; returns how many pictures it holds.

    Args:
        digest: of the tokenizer, so that training can tell whose codes these are.
        progress: called after each batch with how many are done and how many there are.
    """

    def coded() -> Iterator[CodedPicture]:
        pictures, done, sizes = read_pictures(shard), 0, set[tuple[int, ...]]()
        total = sum(1 for _ in read_pictures(shard)) if progress is not None else 0
        while batch := list(islice(pictures, BATCH)):
            yield from _encode(tokenizer, batch, sizes)
            done += len(batch)
            if progress is not None:
                progress(done, total)

    return write_codes(out, coded(), tokenizer=digest)
