import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mars.data.curation.duplicates import CELLS, HammingIndex, colours, nearest_kept, perceptual_hash
from tests.data.conftest import art

Hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8)


def near_hashes(some: list[int], flips: list[int]) -> np.ndarray:
    """The hashes, and each again with some bits flipped."""
    return np.array(some + [one ^ flip for one, flip in zip(some, flips, strict=False)], dtype=np.uint64)


def bits(*places: int) -> int:
    return sum(1 << place for place in set(places))


Flips = st.lists(st.lists(st.integers(0, 63), max_size=12).map(lambda places: bits(*places)), max_size=8)


def test_the_hash_is_that_of_imagehash() -> None:
    # As `imagehash.phash` 4.3.2 gives for the same pictures.
    expected = ["9e11a9f393a46c59", "a1d6a939ec0c16f3", "95d9585613bcec61"]
    assert [f"{perceptual_hash(art(number, size=(100, 80))):016x}" for number in range(3)] == expected


@pytest.mark.parametrize("number", range(10))
def test_scaling_and_compressing_hardly_change_hash_and_colours(number: int) -> None:
    image = art(number, size=(200, 160))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    for changed in (Image.open(file), image.resize((75, 60), Image.Resampling.LANCZOS)):
        assert (perceptual_hash(changed) ^ perceptual_hash(image)).bit_count() <= 4
        apart = np.frombuffer(colours(changed), np.uint8).astype(int) - np.frombuffer(colours(image), np.uint8)
        assert np.abs(apart).max() <= 8


def test_other_pictures_have_other_hashes() -> None:
    hashes = [perceptual_hash(art(number)) for number in range(100)]
    assert min((one ^ other).bit_count() for one, other in itertools.combinations(hashes, 2)) > 8


def test_colour_tells_pictures_of_one_shape_apart() -> None:
    page = np.full((64, 64, 3), 255, dtype=np.uint8)
    red, blue = page.copy(), page.copy()
    red[16:48, 8:40], blue[16:48, 8:40] = (200, 40, 40), (60, 70, 255)  # equally light
    images = [Image.fromarray(one) for one in (red, blue)]
    hashes = np.array([perceptual_hash(one) for one in images], dtype=np.uint64)
    thumbnails = np.array([list(colours(one)) for one in images], dtype=np.uint8)
    order = np.arange(2)
    assert (int(hashes[0]) ^ int(hashes[1])).bit_count() <= 4
    assert nearest_kept(hashes, thumbnails, order=order, distance=4, colour=16).tolist() == [-1, -1]
    assert nearest_kept(hashes, thumbnails, order=order, distance=4, colour=255).tolist() == [-1, 0]


@given(Hashes, Flips, st.integers(0, 11), st.integers(0, 2**64 - 1))
def test_the_index_finds_what_a_look_at_all_finds(some: list[int], flips: list[int], distance: int, other: int) -> None:
    hashes = near_hashes(some, flips)
    index = HammingIndex(hashes, distance=distance)
    for wanted in [*map(int, hashes), other]:
        near = [place for place, one in enumerate(hashes) if (int(one) ^ wanted).bit_count() <= distance]
        assert index.near(wanted).tolist() == near


@given(Hashes, Flips, st.integers(0, 9), st.randoms(use_true_random=False))
def test_what_is_kept_is_far_apart_and_what_is_dropped_is_near_something_better(
    some: list[int], flips: list[int], distance: int, random: object
) -> None:
    hashes = near_hashes(some, flips)
    thumbnails = np.zeros((len(hashes), 3 * CELLS**2), dtype=np.uint8)
    order = np.random.default_rng(len(hashes)).permutation(len(hashes))
    kept_as = nearest_kept(hashes, thumbnails, order=order, distance=distance, colour=0)
    rank = {int(place): number for number, place in enumerate(order)}
    kept = [place for place in range(len(hashes)) if kept_as[place] < 0]
    for one, other in itertools.combinations(kept, 2):
        assert (int(hashes[one]) ^ int(hashes[other])).bit_count() > distance
    for copy in set(range(len(hashes))) - set(kept):
        better = int(kept_as[copy])
        assert better in kept
        assert rank[better] < rank[copy]
        assert (int(hashes[copy]) ^ int(hashes[better])).bit_count() <= distance


def test_no_pictures_have_no_duplicates() -> None:
    none = np.array([], dtype=np.uint64)
    found = nearest_kept(none, np.zeros((0, 48), np.uint8), order=np.arange(0), distance=4, colour=16)
    assert found.tolist() == []


@pytest.mark.slow
def test_a_hundred_thousand_hashes_take_seconds() -> None:
    import time

    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[1::10] = hashes[::10] ^ np.uint64(1 << 40 | 1)
    began = time.perf_counter()
    found = nearest_kept(
        hashes, np.zeros((len(hashes), 48), np.uint8), order=np.arange(len(hashes)), distance=4, colour=16
    )
    assert (found >= 0).sum() == 10_000
    assert time.perf_counter() - began < 120
