import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mars.sequence.layout import IGNORE, Modality, drawn_image, pad, read_image, text_segment, written_text
from mars.sequence.vocabulary import IdRange, Vocabulary

VOCABULARY = Vocabulary(text_size=21, num_codes=13)
texts = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=4)
grids = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@given(texts, st.sampled_from([0, IGNORE]))
def test_padding_keeps_every_row_and_fills_the_right(rows: list[list[int]], fill: int) -> None:
    ids, mask = pad(rows, fill=fill)
    longest = max(map(len, rows))
    assert ids.shape == (len(rows), longest)
    assert (mask is None) == (len({len(row) for row in rows}) == 1)
    real = mask if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    for row, kept, places in zip(rows, ids, real, strict=True):
        assert kept.tolist() == row + [fill] * (longest - len(row))
        assert places.tolist() == [True] * len(row) + [False] * (longest - len(row))


@given(texts)
def test_text_that_is_read_has_no_targets(rows: list[list[int]]) -> None:
    segment = text_segment(rows)
    assert segment.modality is Modality.TEXT
    assert segment.targets is None


@given(grids)
def test_each_position_of_a_drawn_image_predicts_the_next_code(shape: tuple[int, int, int]) -> None:
    codes = torch.randint(13, shape)
    segment = drawn_image(codes, VOCABULARY)
    raster = codes.reshape(shape[0], -1) + VOCABULARY.first_code
    assert segment.modality is Modality.IMAGE
    assert segment.columns == shape[2]
    assert segment.ids.shape == (shape[0], shape[1] * shape[2])
    assert bool((segment.ids[:, 0] == VOCABULARY.image_start).all())
    assert torch.equal(segment.ids[:, 1:], raster[:, :-1])
    assert segment.targets is not None
    assert torch.equal(segment.targets, raster)
    assert {VOCABULARY.range_of(index) for index in segment.targets.flatten().tolist()} == {IdRange.CODE}


@given(grids)
def test_an_image_that_is_read_shows_all_its_codes(shape: tuple[int, int, int]) -> None:
    codes = torch.randint(13, shape)
    read, drawn = read_image(codes, VOCABULARY), drawn_image(codes, VOCABULARY)
    assert torch.equal(read.ids[:, :-1], drawn.ids)
    assert torch.equal(read.ids[:, -1], codes[:, -1, -1] + VOCABULARY.first_code)
    assert (read.targets, read.columns) == (None, shape[2])


@given(texts, st.integers(0, 3))
def test_written_text_starts_after_the_image_and_stops_at_its_end(rows: list[list[int]], longest: int) -> None:
    hints = [[20] * (index % (longest + 1)) for index in range(len(rows))]
    segment = written_text(rows, VOCABULARY, hints=hints, end=2)
    assert segment.modality is Modality.TEXT
    assert segment.targets is not None
    assert segment.targets.shape == segment.ids.shape
    for row, hint, ids, targets in zip(rows, hints, segment.ids.tolist(), segment.targets.tolist(), strict=True):
        rest = len(ids) - len(hint) - len(row) - 1
        assert ids == [VOCABULARY.image_end, *hint, *row] + [0] * rest
        assert targets == [IGNORE] * len(hint) + [*row, 2] + [IGNORE] * rest
        if segment.mask is None:
            assert rest == 0


def test_written_text_needs_a_hint_for_each_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        written_text([[1], [2]], VOCABULARY, hints=[[]], end=2)
