"""Pictures to codes, so that training never runs the image tokenizer.

The unit is a block: neighbours in a shard, encoded together. A batch of another shape may round differently, so a
picture's codes are a function of its block; whoever computes it, and how many compute beside it, changes no byte.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mars.data.crops import Sizes
from mars.data.ingestion.decoding import stored_form
from mars.data.shards import CodedPicture, Picture, read_pictures, write_codes
from mars.errors import DataError, ImageError, RequestError
from mars.image_tokenizer.model import ImageTokenizer

BLOCK = 64
PIXELS = 1 << 18
"""Of the images in a batch, or one image: the tokenizer's memory is in proportion."""

Codes = npt.NDArray[np.int32]
"""(rows, columns) of one picture at one size."""
Outcome = list[Codes] | str
"""The codes of a picture at each size, or why it has none."""


def blocks(pictures: Iterator[Picture]) -> Iterator[list[Picture]]:
    """Neighbours, `BLOCK` at a time; the last may be fewer."""
    while block := list(islice(pictures, BLOCK)):
        yield block


def encode_block(pictures: Sequence[Picture], *, tokenizer: ImageTokenizer, sizes: Sizes) -> list[Outcome]:
    """The codes of each picture at each of the sizes, or why it cannot be encoded."""
    outcomes: list[Outcome] = []
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    images: dict[tuple[int, int], list[npt.NDArray[np.uint8]]] = {}
    for number, picture in enumerate(pictures):
        try:
            sound = stored_form(picture.content)  # as ingestion left it; or as it would, for shards of others
            image = Image.open(io.BytesIO(sound.content)).convert("RGB")
            found = sizes.images(image, key=picture.record.key)
        except (ImageError, RequestError) as error:
            outcomes.append(str(error))
            continue
        outcomes.append([np.empty((0, 0), dtype=np.int32)] * len(found))
        for place, one in enumerate(found):
            places.setdefault(one.size, []).append((number, place))
            images.setdefault(one.size, []).append(np.asarray(one))
    for size, alike in images.items():
        for (number, place), codes in zip(places[size], _encode(tokenizer, alike), strict=True):
            outcomes[number][place] = codes  # type: ignore[index] # a list, since it has images
    return outcomes


@torch.inference_mode()
def _encode(tokenizer: ImageTokenizer, images: list[npt.NDArray[np.uint8]]) -> Iterator[Codes]:
    """Codes of images (height, width, 3) of one size."""
    count = max(1, PIXELS // (images[0].shape[0] * images[0].shape[1]))
    for start in range(0, len(images), count):
        batch = torch.from_numpy(np.stack(images[start : start + count])).permute(0, 3, 1, 2).float() / 255
        yield from tokenizer.encode(batch).numpy().astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What a worker computes, wherever it runs: small to send, opens the image tokenizer when it is first called.

    Args:
        load: opens an image tokenizer's folder; a function of a module, found by its name in the worker.
        digest: of the image tokenizer.
    """

    load: Callable[[Path], tuple[ImageTokenizer, Any]]
    folder: Path
    digest: str
    sizes: Sizes

    def __call__(self, pictures: Sequence[Picture]) -> list[Outcome]:
        """`encode_block` with one thread: how many there are could change how sums round."""
        torch.set_num_threads(1)
        return encode_block(pictures, tokenizer=_loaded(self.load, self.folder), sizes=self.sizes)


@lru_cache(maxsize=1)
def _loaded(load: Callable[[Path], tuple[ImageTokenizer, Any]], folder: Path) -> ImageTokenizer:
    return load(folder)[0]


def encode_pictures(
    pictures: Path,
    *,
    tokenizer: ImageTokenizer,
    digest: str,
    out: Path,
    sizes: Sizes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes one code shard here and now; returns how many pictures it holds.

    Args:
        pictures: a picture shard or a folder of them.
        digest: of the tokenizer, so that training can tell whose codes these are.
        sizes: null leaves pictures as they are.
        progress: called after each block with how many are done and how many there are.

    Raises:
        DataError: if the shard cannot be read, or a picture cannot be encoded; nothing is written then.
    """
    chosen = sizes or Sizes(factor=tokenizer.config.factor)

    def coded() -> Iterator[CodedPicture]:
        done, total = 0, sum(1 for _ in read_pictures(pictures)) if progress is not None else 0
        for block in blocks(read_pictures(pictures)):
            outcomes = encode_block(block, tokenizer=tokenizer, sizes=chosen)
            for picture, outcome in zip(block, outcomes, strict=True):
                if isinstance(outcome, str):
                    raise DataError(f"picture {picture.record.key} of {pictures} cannot be encoded: {outcome}")
                yield from (CodedPicture(record=picture.record, codes=codes) for codes in outcome)
            done += len(block)
            if progress is not None:
                progress(done, total)

    return write_codes(out, coded(), tokenizer=digest) // max(1, len(chosen.sizes))
