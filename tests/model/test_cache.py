"""However a sequence is cut into calls, and whatever shares its batch, its hidden states are the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import RequestError
from mars.model.cache import Cache
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import (
    Segment,
    drawn_image,
    low_image,
    read_image,
    text_segment,
    upscaled_image,
    written_text,
)

Build = Callable[..., MarsTransformer]
NARROW: dict[str, Any] = {"share_norms": False, "visual_width": 16, "visual_ffn": 24, "init": "random"}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "qk norm": {"language": {"qk_norm": True}},
    "bias": {"language": {"qkv_bias": True}},
    "one key head": {"language": {"num_kv_heads": 1}},
    "a key head each": {"language": {"num_kv_heads": 4}},
    "own norms": {"share_norms": False},
    "shared output": {"duplicate_output": False},
    "own norms, shared output": {"share_norms": False, "duplicate_output": False},
    "grid": {"grid_embedding": True},
    "grid, low input": {"grid_embedding": True, "low_input": True},
    "subset": {"visual_layers": (0, 2)},
    "last layer": {"visual_layers": (2,)},
    "subset, grid, own norms": {"visual_layers": (1,), "grid_embedding": True, "share_norms": False},
    "narrow": NARROW,
    "head norms": {"head_norms": True, "init": "random"},
    "narrow, head norms, subset": {**NARROW, "head_norms": True, "visual_layers": (1, 2)},
    "narrow, subset, grid": {**NARROW, "visual_layers": (0, 2), "grid_embedding": True},
}
TEXTS = [[3, 1, 4, 1, 5], [9, 2], [6]]
ROWS, COLUMNS = 2, 3

every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
both_caches = pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def new_cache(transformer: MarsTransformer, batch: int, *, static: bool) -> Cache:
    return transformer.new_static_cache(batch=batch, size=24) if static else transformer.new_cache()


def pieces(segment: Segment, lengths: Sequence[int]) -> list[Segment]:
    """Cuts a segment without padding into shorter ones."""
    assert segment.mask is None
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        replace(
            segment,
            ids=segment.ids[:, start : start + length],
            targets=None,
            start=start,
            low=None if segment.low is None else segment.low[:, start : start + length],
        )
        for start, length in zip(starts, lengths, strict=True)
    ]


def draw(transformer: MarsTransformer, texts: list[list[int]], codes: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of captions and of the images after them, each in one go."""
    cache = transformer.new_cache()
    text = transformer(text_segment(texts), cache)
    return text, transformer(drawn_image(codes, transformer.vocabulary), cache)


@every_variant
@both_caches
@pytest.mark.parametrize("lengths", [[1] * 6, [4, 1, 1], [1, 5]], ids=str)
@torch.no_grad()
def test_an_image_drawn_in_steps_is_the_image_in_one_go(
    build: Build, options: dict[str, Any], static: bool, lengths: list[int]
) -> None:
    transformer = build(**options)
    codes = torch.randint(13, (3, ROWS, COLUMNS))
    _, wanted = draw(transformer, TEXTS, codes)
    cache = new_cache(transformer, 3, static=static)
    transformer(text_segment(TEXTS), cache)
    steps = [transformer(piece, cache) for piece in pieces(drawn_image(codes, transformer.vocabulary), lengths)]
    close(torch.cat(steps, dim=1), wanted)


def upscaling(transformer: MarsTransformer, low: Tensor, high: Tensor, side: int) -> list[Segment]:
    """The images of super-resolution."""
    vocabulary = transformer.vocabulary
    return [low_image(low, vocabulary), upscaled_image(low, high, vocabulary, side=side)]


@both_caches
@pytest.mark.parametrize(("side", "blocks"), [(1, [1] * 32), (2, [1] * 8), (2, [3, 1, 4]), (4, [1, 1]), (4, [2])])
@pytest.mark.parametrize("options", [{}, {"grid_embedding": True, "max_grid": 8, "visual_layers": (0, 2)}], ids=str)
@torch.no_grad()
def test_an_image_drawn_in_blocks_is_the_image_in_one_go_and_each_row_as_alone(
    build: Build, options: dict[str, Any], static: bool, side: int, blocks: list[int]
) -> None:
    transformer = build(**options, low_input=True)
    low, high = torch.randint(13, (3, 2, 4)), torch.randint(13, (3, 4, 8))
    cache = transformer.new_static_cache(batch=3, size=46) if static else transformer.new_cache()
    transformer(text_segment(TEXTS), cache)
    first, second = upscaling(transformer, low, high, side)
    transformer(first, cache)
    lengths = [count * side * side for count in blocks]
    found = torch.cat([transformer(piece, cache) for piece in pieces(second, lengths)], dim=1)
    for row, ids in enumerate(TEXTS):
        alone = transformer.new_cache()
        transformer(text_segment([ids]), alone)
        segments = upscaling(transformer, low[row : row + 1], high[row : row + 1], side)
        close(found[row : row + 1], [transformer(segment, alone) for segment in segments][1])


@pytest.mark.parametrize("side", [1, 2, 4])
@torch.no_grad()
def test_a_block_sees_itself_and_all_before_it_and_nothing_after(build: Build, side: int) -> None:
    transformer = build(low_input=True)
    low, high = torch.randint(13, (1, 4, 4)), torch.randint(13, (1, 8, 8))
    read, drawn = upscaling(transformer, low, high, side)

    def hidden(changed: int | None = None) -> Tensor:
        """States after the input of one position was changed."""
        ids = drawn.ids.clone()
        if changed is not None:
            ids[0, changed] = transformer.vocabulary.first_code + (ids[0, changed] + 1) % 13
        cache = transformer.new_cache()
        transformer(read, cache)
        states: Tensor = transformer(replace(drawn, ids=ids), cache)
        return states[0]

    before = hidden()
    for changed in (0, 16, 37, 63):
        moved = (hidden(changed) != before).any(dim=1)
        first = changed // drawn.block * drawn.block
        assert moved.tolist() == [number >= first for number in range(64)], changed


@torch.no_grad()
def test_every_code_has_the_rotary_position_of_its_raster_place(build: Build) -> None:
    transformer = build(low_input=True)
    low, high = torch.randint(13, (1, 2, 2)), torch.randint(13, (1, 4, 4))
    read, drawn = upscaling(transformer, low, high, 2)
    for static in (False, True):
        cache = new_cache(transformer, 1, static=static)
        cache.begin(read)
        positions = torch.cat([cache.begin(piece) for piece in pieces(drawn, [4, 8, 4])], dim=1)
        row, column = drawn.places()
        assert positions.tolist() == [(5 + row * 4 + column).tolist()]


@every_variant
@both_caches
@torch.no_grad()
def test_a_caption_written_in_steps_is_the_caption_in_one_go(
    build: Build, options: dict[str, Any], static: bool
) -> None:
    transformer = build(**options)
    image = read_image(torch.randint(13, (2, ROWS, COLUMNS)), transformer.vocabulary)
    caption = written_text([[1, 4], [2, 6]], transformer.vocabulary, hints=[[3], [9]], end=0)
    whole = transformer.new_cache()
    wanted = [transformer(image, whole), transformer(caption, whole)]
    cache = new_cache(transformer, 2, static=static)
    for segment, lengths, states in ((image, [3, 4], wanted[0]), (caption, [1, 2, 1], wanted[1])):
        steps = [transformer(piece, cache) for piece in pieces(segment, lengths)]
        close(torch.cat(steps, dim=1), states)


@every_variant
@both_caches
@torch.no_grad()
def test_rows_of_different_lengths_are_as_each_alone(build: Build, options: dict[str, Any], static: bool) -> None:
    transformer = build(**options)
    codes = torch.randint(13, (3, ROWS, COLUMNS))
    cache = new_cache(transformer, 3, static=static)
    text = transformer(text_segment(TEXTS), cache)
    image = transformer(drawn_image(codes, transformer.vocabulary), cache)
    for row, ids in enumerate(TEXTS):
        alone_text, alone_image = draw(transformer, [ids], codes[row : row + 1])
        close(text[row : row + 1, : len(ids)], alone_text)
        close(image[row : row + 1], alone_image)


@every_variant
@torch.no_grad()
def test_text_after_images_of_padded_rows_is_as_each_alone(build: Build, options: dict[str, Any]) -> None:
    transformer = build(**options)
    codes = torch.randint(13, (3, ROWS, COLUMNS))
    captions, hints = [[7], [8, 9], [11, 12]], [[13], [14, 15], []]

    def run(rows: slice) -> Tensor:
        cache = transformer.new_cache()
        transformer(text_segment(TEXTS[rows]), cache)
        transformer(read_image(codes[rows], transformer.vocabulary), cache)
        written = written_text(captions[rows], transformer.vocabulary, hints=hints[rows], end=0)
        hidden: Tensor = transformer(written, cache)
        return hidden

    together = run(slice(0, 3))
    for row in range(3):
        alone = run(slice(row, row + 1))
        close(together[row : row + 1, : alone.shape[1]], alone)


@every_variant
@both_caches
@torch.no_grad()
def test_a_loaded_prefix_stands_for_its_text(build: Build, options: dict[str, Any], static: bool) -> None:
    transformer = build(**options)
    codes = torch.randint(13, (3, ROWS, COLUMNS))
    text, wanted = draw(transformer, TEXTS, codes)
    first = transformer.new_cache()
    prefixes = first.prefixes(transformer(text_segment(TEXTS), first))
    for row, (prefix, ids) in enumerate(zip(prefixes, TEXTS, strict=True)):
        assert prefix.keys.shape == prefix.values.shape
        assert prefix.keys.shape[0] == len(transformer.config.visual_layers)
        assert prefix.keys.shape[2] == len(ids)
        close(prefix.last_hidden, text[row, len(ids) - 1])
    cache = new_cache(transformer, 2, static=static)
    cache.load([prefixes[2], prefixes[0]])  # another order, another longest row
    image = drawn_image(codes[[2, 0]], transformer.vocabulary)
    found = torch.cat([transformer(piece, cache) for piece in pieces(image, [1, 1, 4])], dim=1)
    close(found, wanted[[2, 0]])


@torch.no_grad()
def test_padding_leaves_no_trace(build: Build) -> None:
    transformer = build()
    codes = torch.randint(13, (2, ROWS, COLUMNS))
    padded = text_segment([[3, 1, 4], [9]])
    other = replace(padded, ids=torch.where(padded.mask, padded.ids, 17) if padded.mask is not None else padded.ids)
    assert not torch.equal(other.ids, padded.ids)
    images = []
    for text in (padded, other):
        cache = transformer.new_cache()
        transformer(text, cache)
        images.append(transformer(drawn_image(codes, transformer.vocabulary), cache))
    assert torch.equal(*images)


def test_a_position_sees_nothing_later(build: Build) -> None:
    transformer = build(grid_embedding=True)
    codes = torch.randint(13, (1, ROWS, COLUMNS))
    changed = codes.clone()
    changed[0, 1, 0] = (changed[0, 1, 0] + 1) % 13  # code 3, the input of position 4
    _, before = draw(transformer, [[3, 1]], codes)
    _, after = draw(transformer, [[3, 1]], changed)
    close(after[:, :4], before[:, :4])
    assert (after[:, 4] - before[:, 4]).abs().max() > 1e-3


def test_a_static_cache_says_when_it_is_full(build: Build) -> None:
    transformer = build()
    cache = transformer.new_static_cache(batch=1, size=3)
    transformer(text_segment([[1, 2]]), cache)
    with pytest.raises(RequestError, match="the sequence must fit into 3 positions, got 4"):
        transformer(text_segment([[3, 4]]), cache)


def test_a_static_cache_fills_to_its_last_place(build: Build) -> None:
    transformer = build()
    transformer(text_segment([[1, 2, 3]]), transformer.new_static_cache(batch=1, size=3))


@torch.no_grad()
def test_a_static_cache_says_when_a_prefix_is_too_long(build: Build) -> None:
    transformer = build()
    cache = transformer.new_cache()
    prefixes = cache.prefixes(transformer(text_segment([[1, 2, 3, 4]]), cache))
    with pytest.raises(RequestError, match="the sequence must fit into 3 positions, got 4"):
        transformer.new_static_cache(batch=1, size=3).load(prefixes)


@every_variant
@torch.no_grad()
def test_rows_come_and_go_at_any_step_and_each_is_as_alone(build: Build, options: dict[str, Any]) -> None:
    transformer = build(**options)
    codes = torch.randint(13, (3, 3, 4))
    first = transformer.new_cache()
    prefixes = first.prefixes(transformer(text_segment(TEXTS), first))
    wanted = [draw(transformer, [ids], codes[row : row + 1])[1][0] for row, ids in enumerate(TEXTS)]
    image = drawn_image(codes, transformer.vocabulary)
    cache = transformer.new_static_cache(batch=2, size=14, images_only=True)
    running: list[int] = []
    places = [0, 0, 0]
    # Row 1 leaves after five codes, and row 2 takes over its place; the cache grows on the way.
    for step in range(24):
        if step in (0, 2):
            running.append(step // 2)
            cache.load([prefixes[running[-1]]])
        if step == 7:
            cache.remove(running.index(1))
            running = [0, 2]
            cache.load([prefixes[2]])
        if step == 9:
            cache.resize(batch=3, size=20)
        if step == 12:
            cache.remove(running.index(0))
            running = [2]
        starts = torch.tensor([[places[row]] for row in running])
        ids = image.ids[running].gather(1, starts)
        hidden = transformer(replace(image, ids=ids, targets=None, start=starts), cache)
        for index, row in enumerate(running):
            close(hidden[index, 0], wanted[row][places[row]])
            places[row] += 1
        if places[2] == 12:
            break
    assert places == [12, 5, 12]
    cache.remove(0)
    assert cache.rows == 0


@torch.no_grad()
def test_what_an_image_leaves_behind_can_be_loaded_too(build: Build) -> None:
    transformer = build(low_input=True)
    low, high = torch.randint(13, (1, 2, 2)), torch.randint(13, (1, 4, 4))
    read, drawn = upscaling(transformer, low, high, 2)
    cache = transformer.new_cache()
    transformer(text_segment([[3, 1]]), cache)
    prefix = cache.prefixes(transformer(read, cache))[0]
    wanted = transformer(drawn, cache)
    assert prefix.keys.shape[2] == 7
    loaded = transformer.new_static_cache(batch=1, size=23, images_only=True)
    loaded.load([prefix])
    close(transformer(drawn, loaded), wanted)
