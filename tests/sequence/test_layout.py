import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mars.errors import ConfigError
from mars.sequence.layout import (
    IGNORE,
    Modality,
    drawing_order,
    drawn_image,
    low_image,
    pad,
    read_image,
    refined_codes,
    text_segment,
    upscaled_image,
    written_text,
)
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


blocks = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3))


@given(blocks)
def test_blocks_hold_every_place_once_in_raster_order_of_blocks_and_inside_each(shape: tuple[int, int, int]) -> None:
    side, down, across = shape
    columns = across * side
    order = drawing_order(down * side, columns, side=side).tolist()
    assert sorted(order) == list(range(down * side * columns))
    wanted = [
        (down_block * side + row) * columns + across_block * side + column
        for down_block in range(down)
        for across_block in range(across)
        for row in range(side)
        for column in range(side)
    ]
    assert order == wanted


def test_side_2_draws_a_grid_of_four_rows_as_the_page_shows() -> None:
    numbers = torch.empty(16, dtype=torch.long)
    numbers[drawing_order(4, 4, side=2)] = torch.arange(16)
    assert numbers.view(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_each_position_of_a_block_gets_the_block_before_and_the_code_that_it_refines(
    down: int, across: int, side: int, factor: int
) -> None:
    rows, columns = down * side * factor, across * side * factor
    low, high = torch.randint(13, (2, down * side, across * side)), torch.randint(13, (2, rows, columns))
    segment = upscaled_image(low, high, VOCABULARY, side=side)
    assert segment.targets is not None
    assert segment.low is not None
    block = segment.block
    assert block == side * side
    assert bool((segment.ids[:, :block] == VOCABULARY.image_start).all())
    assert torch.equal(segment.ids[:, block:], segment.targets[:, :-block])
    row, column = segment.places()
    assert torch.equal(segment.targets, high[:, row, column] + VOCABULARY.first_code)
    assert torch.equal(segment.low, low[:, row // factor, column // factor] + VOCABULARY.first_code)


@given(grids)
def test_blocks_of_one_code_are_an_ordinary_image(shape: tuple[int, int, int]) -> None:
    codes = torch.randint(13, shape)
    found, wanted = upscaled_image(codes, codes, VOCABULARY, side=1), drawn_image(codes, VOCABULARY)
    assert found.targets is not None
    assert wanted.targets is not None
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.targets, wanted.targets)
    assert (found.columns, found.side, found.start) == (wanted.columns, wanted.side, wanted.start)


def test_a_low_image_is_a_read_image_that_begins_otherwise() -> None:
    codes = torch.randint(13, (2, 3, 4))
    low, read = low_image(codes, VOCABULARY), read_image(codes, VOCABULARY)
    assert torch.equal(low.ids[:, 1:], read.ids[:, 1:])
    assert set(low.ids[:, 0].tolist()) == {VOCABULARY.low_start}
    assert VOCABULARY.range_of(VOCABULARY.low_start) is IdRange.SPECIAL


@pytest.mark.parametrize(("rows", "columns", "side"), [(2, 3, 2), (3, 4, 2), (4, 4, 0), (4, 6, 4)])
def test_blocks_that_do_not_fill_the_grid_are_one_line(rows: int, columns: int, side: int) -> None:
    with pytest.raises(ConfigError, match=f"blocks of {side}x{side} codes must fill the grid, got {rows}x{columns}"):
        drawing_order(rows, columns, side=side)


@pytest.mark.parametrize("grid", [(3, 6), (1, 1), (4, 4), (6, 4)])
def test_a_grid_that_is_no_multiple_is_one_line(grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"got {grid[0]}x{grid[1]} for 2x3"):
        refined_codes(torch.zeros(1, 2, 3), grid=grid)


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


@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]), st.integers(1, 3), st.integers(1, 3))
def test_the_codes_of_a_cell_follow_each_other_in_raster_order(shape: tuple[int, int], down: int, across: int) -> None:
    side, cell = shape
    rows, columns = down * side, across * side
    order = drawing_order(rows, columns, side=side, cell=cell)
    assert sorted(order.tolist()) == list(range(rows * columns))
    for place in order.view(-1, cell, cell):
        assert place[0, 0] // columns % cell == place[0, 0] % columns % cell == 0
        assert torch.equal(place - place[0, 0], torch.arange(cell)[:, None] * columns + torch.arange(cell))
    firsts = order.view(-1, cell * cell)[:, 0]
    blocks = drawing_order(rows // cell, columns // cell, side=side // cell)
    assert torch.equal(firsts // columns // cell * (columns // cell) + firsts % columns // cell, blocks)


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
def test_positions_with_cells_hold_squares_of_codes(count: int, down: int, across: int) -> None:
    vocabulary = Vocabulary(text_size=21, num_codes=13, cell=2)
    codes = torch.randint(13, (count, 2 * down, 2 * across))
    drawn, read = drawn_image(codes, vocabulary), read_image(codes, vocabulary)
    assert drawn.ids.shape == (count, down * across, 4)
    assert drawn.columns == across
    assert drawn.targets is not None
    squares = codes.unfold(1, 2, 2).unfold(2, 2, 2).reshape(count, down * across, 4)
    assert torch.equal(drawn.targets - vocabulary.first_code, squares)
    assert torch.equal(read.ids[:, 1:], drawn.targets)
    assert bool((read.ids[:, 0] == vocabulary.image_start).all())
    assert [place.tolist() for place in drawn.places()] == [
        [row for row in range(down) for _ in range(across)],
        [column for _ in range(down) for column in range(across)],
    ]
