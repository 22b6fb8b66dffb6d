"""Pictures that look the same: a perceptual hash and a coarse thumbnail of each, and an index of near hashes.

The hash sees shapes and no colour: a red heart has the hash of a blue one. The thumbnail tells them apart.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE, KEPT = 32, 8
"""Pixels on each side that the hash looks at, and frequencies kept on each side."""
CELLS = 4
"""Cells on each side of the thumbnail of colours."""
BANDS, BAND_BITS = 4, 16

_DCT = np.cos(np.pi / SIDE * np.outer(np.arange(KEPT), np.arange(SIDE) + 0.5))
"""The lowest rows of the DCT-II, without its factors, which do not change which value is above the median."""


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay nearly the same when a picture is scaled or compressed; the first frequency is the highest bit.

    The DCT hash of Zauner (2010), bit for bit `imagehash.phash`: which of the 8x8 lowest frequencies of the grey 32x32
    picture lie above their median.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies = _DCT @ grey @ _DCT.T
    bits = (frequencies > np.median(frequencies)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def colours(image: Image.Image) -> bytes:
    """Mean red, green and blue of 4x4 cells: 48 bytes."""
    return image.convert("RGB").resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()


class HammingIndex:
    """Finds the hashes that differ in few bits without looking at all.

    Multi-index hashing (Norouzi, Punjani and Fleet 2012): of two hashes that differ in at most `distance` bits, one of
    the four 16-bit bands differs in at most distance // 4. Each band has a table from its values to positions.
    Takes 24 bytes per hash.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64], *, distance: int) -> None:
        self.hashes, self.distance = hashes, distance
        flips = [bits for bits in range(1 << BAND_BITS) if bits.bit_count() <= distance // BANDS]
        self._flips = np.array(flips, dtype=np.int64)
        self._tables = []
        for band in range(BANDS):
            values = _band(hashes, band)
            order = np.argsort(values, kind="stable").astype(np.uint32)
            starts = np.concatenate([[0], np.bincount(values, minlength=1 << BAND_BITS).cumsum()])
            self._tables.append((order, starts))

    def near(self, wanted: int) -> npt.NDArray[np.int64]:
        """Positions of the hashes within the distance, ascending."""
        buckets = []
        for band, (order, starts) in enumerate(self._tables):
            values = self._flips ^ (wanted >> (BAND_BITS * band) & (1 << BAND_BITS) - 1)
            buckets += [order[first:last] for first, last in zip(starts[values], starts[values + 1], strict=True)]
        found = np.unique(np.concatenate(buckets)).astype(np.int64)
        differing = np.bitwise_count(self.hashes[found] ^ np.uint64(wanted))
        near: npt.NDArray[np.int64] = found[differing <= self.distance]
        return near


def _band(hashes: npt.NDArray[np.uint64], band: int) -> npt.NDArray[np.uint16]:
    return (hashes >> np.uint64(BAND_BITS * band)).astype(np.uint16)


def nearest_kept(
    hashes: npt.NDArray[np.uint64],
    thumbnails: npt.NDArray[np.uint8],
    *,
    order: npt.NDArray[np.int64],
    distance: int,
    colour: int,
) -> npt.NDArray[np.int64]:
    """For each of N pictures the one that it duplicates, or -1 where it is kept.

    Pictures are taken in `order`, best first: one is kept unless it is near one that was kept before. So no two
    that are kept are near each other, and each that is dropped is near a better one.

    Args:
        hashes: (N,).
        thumbnails: (N, 48), as `colours` gives.
        order: (N,) a permutation.
        distance: most bits in which the hashes of near pictures differ.
        colour: most that the thumbnails of near pictures differ anywhere, of 255.
    """
    index = HammingIndex(hashes, distance=distance)
    kept_as = np.full(len(hashes), -1, dtype=np.int64)
    settled = np.zeros(len(hashes), dtype=bool)
    for position in order:
        if settled[position]:
            continue
        settled[position] = True
        near = index.near(int(hashes[position]))
        near = near[~settled[near]]
        if len(near):
            unlike = np.abs(thumbnails[near].astype(np.int16) - thumbnails[position].astype(np.int16)).max(axis=1)
            near = near[unlike <= colour]
            kept_as[near] = position
            settled[near] = True
    return kept_as
