"""How text and images become one sequence: a list of segments, each of one modality.

    text to image    [ text: caption                 ] [ image: <img> c0 c1 ... ]
    captioning       [ image: <img> c0 c1 ... c(N-1) ] [ text: </img> caption   ]
    super-resolution [ text: caption ] [ image: <low> l0 l1 ... ] [ image: blocks of the high-resolution grid ]

`<img>` belongs to the image (it predicts the first code, so the trained expert runs it); `</img>` belongs to the text.
Rows of a batch are padded on the right; `mask` says which positions are real.

Super-resolution with the next K tokens is our own design: the paper gives none that can be confirmed. The high grid is
cut into blocks of side x side codes, K = side * side of them, in raster order of blocks. One step runs a block: each of
its positions predicts the code at its own place, from the code at the same place of the block before (`<img>` in the
first block) and from the code of the low-resolution cell that it refines. Attention is causal between blocks and full
inside one. With side = 1 that is next-token prediction. Side 2, in order, of a grid of four rows and columns:

     0  1 |  4  5
     2  3 |  6  7
    ------+------
     8  9 | 12 13
    10 11 | 14 15

Letters: B batch, T positions, R rows, C columns, N = R * C codes, K codes of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from mars.errors import ConfigError
from mars.sequence.vocabulary import Vocabulary

IGNORE = -100
"""The target of a position that is not trained on."""


class Modality(Enum):
    """Which expert runs a segment."""

    TEXT = "text"
    IMAGE = "image"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A contiguous run of positions of one modality."""

    modality: Modality
    ids: Tensor
    """(B, T) ids of the joint vocabulary."""
    mask: Tensor | None = None
    """(B, T) true where a position is real; null where all are."""
    targets: Tensor | None = None
    """(B, T) the id that each position should predict, or IGNORE."""
    columns: int | Tensor = 0
    """Image only: columns of the code grid; (B, 1) where rows differ."""
    start: int | Tensor = 0
    """Image only: number of the first position, 0 being `<img>`; position p predicts code p in the order of drawing.
    (B, 1) where rows differ."""
    side: int = 1
    """Image only: codes are drawn in blocks of side x side; 1 is raster order. A segment holds whole blocks."""
    low: Tensor | None = None
    """Image only: (B, T) id of the low-resolution code that each position refines."""

    @property
    def block(self) -> int:
        """K, the positions of one step."""
        return self.side * self.side

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of the code that each position of an image predicts: (T,), or (B, T) where rows differ."""
        numbers = self.start + torch.arange(self.ids.shape[1], device=self.ids.device)
        return _row_and_column(numbers, columns=self.columns, side=self.side)

    def to(self, device: torch.device) -> "Segment":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)
        }
        return replace(self, **moved)


def _row_and_column(numbers: Tensor, *, columns: int | Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Row and column of codes by their number in the order of drawing, of the same shape."""
    if side == 1:
        return numbers // columns, numbers % columns
    blocks, inside = numbers // (side * side), numbers % (side * side)
    blocks_across = columns // side
    rows = blocks // blocks_across * side + inside // side
    return rows, blocks % blocks_across * side + inside % side


def drawing_order(rows: int, columns: int, *, side: int) -> Tensor:
    """Raster places (N,) of the codes of a grid in the order in which blocks of side x side draw them.

    Raises:
        ConfigError: if blocks do not fill the grid.
    """
    if side < 1 or rows % side or columns % side:
        raise ConfigError(f"blocks of {side}x{side} codes must fill the grid, got {rows}x{columns}; use another block")
    row, column = _row_and_column(torch.arange(rows * columns), columns=columns, side=side)
    return row * columns + column


def refined_codes(low_BRC: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """The low-resolution code that each code of a larger grid refines, (B, *grid).

    Raises:
        ConfigError: if the grid is not a whole number of times larger, the same both ways.
    """
    rows, columns = low_BRC.shape[1:]
    factor = grid[0] // rows
    if factor < 1 or grid != (rows * factor, columns * factor):
        raise ConfigError(
            f"a high grid must be a whole number of times the low one, got {grid[0]}x{grid[1]} for {rows}x{columns}"
        )
    return low_BRC.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def pad(rows: Sequence[Sequence[int]], *, fill: int) -> tuple[Tensor, Tensor | None]:
    """Ids of different lengths as (B, T) on the right-padded grid, and their mask (null when all are equal)."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([list(row) + [fill] * (longest - len(row)) for row in rows])
    if bool((lengths == longest).all()):
        return ids, None
    return ids, torch.arange(longest) < lengths[:, None]


def text_segment(rows: Sequence[Sequence[int]]) -> Segment:
    """Text that is only read: (B, T) of the longest row."""
    ids, mask = pad(rows, fill=0)
    return Segment(modality=Modality.TEXT, ids=ids, mask=mask)


def drawn_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """An image to be drawn: `<img>` and all codes but the last, each predicting the next code. T = N."""
    ids = codes_BRC.flatten(1) + vocabulary.first_code
    start = ids.new_full((len(ids), 1), vocabulary.image_start)
    return Segment(
        modality=Modality.IMAGE,
        ids=torch.cat([start, ids[:, :-1]], dim=1),
        targets=ids,
        columns=codes_BRC.shape[2],
    )


def upscaled_image(low_BRC: Tensor, high_BRC: Tensor, vocabulary: Vocabulary, *, side: int) -> Segment:
    """An image to be drawn in blocks of side x side codes, after the smaller one that it refines was read. T = N.

    Raises:
        ConfigError: if blocks do not fill the grid, or it is not a whole number of times the low one.
    """
    rows, columns = high_BRC.shape[1:]
    order = drawing_order(rows, columns, side=side).to(high_BRC.device)
    low = refined_codes(low_BRC, grid=(rows, columns)).flatten(1)[:, order] + vocabulary.first_code
    ids = high_BRC.flatten(1)[:, order] + vocabulary.first_code
    start = ids.new_full((len(ids), side * side), vocabulary.image_start)
    return Segment(
        modality=Modality.IMAGE,
        ids=torch.cat([start, ids[:, : -side * side]], dim=1),
        targets=ids,
        columns=columns,
        side=side,
        low=low,
    )


def read_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """An image that is only read: `<img>` and all codes. T = N + 1."""
    return _read(codes_BRC, vocabulary, start=vocabulary.image_start)


def low_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """A low-resolution image that is read before a larger one is drawn: `<low>` and all codes. T = N + 1."""
    return _read(codes_BRC, vocabulary, start=vocabulary.low_start)


def _read(codes_BRC: Tensor, vocabulary: Vocabulary, *, start: int) -> Segment:
    ids = codes_BRC.flatten(1) + vocabulary.first_code
    begin = ids.new_full((len(ids), 1), start)
    return Segment(modality=Modality.IMAGE, ids=torch.cat([begin, ids], dim=1), columns=codes_BRC.shape[2])


def written_text(
    rows: Sequence[Sequence[int]], vocabulary: Vocabulary, *, hints: Sequence[Sequence[int]], end: int
) -> Segment:
    """Text that follows an image: `</img>`, a hint that is only read, and the caption, predicted, `end` last."""
    pairs = list(zip(hints, rows, strict=True))
    ids, mask = pad([[vocabulary.image_end, *hint, *row] for hint, row in pairs], fill=0)
    targets, _ = pad([[IGNORE] * len(hint) + [*row, end] for hint, row in pairs], fill=IGNORE)
    return Segment(modality=Modality.TEXT, ids=ids, mask=mask, targets=targets)
