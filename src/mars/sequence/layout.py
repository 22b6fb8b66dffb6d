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

A position may also hold a cell of codes (`Vocabulary.cell`, ours): a square of them is read as one position, and
predicted at one, code by code in raster order (`model/cells.py`). Ids and targets are then (B, T, K), positions count
cells, and blocks are of cells.

Letters: B batch, T positions, R rows, C columns, N = R * C codes, K codes of a block, or of a cell.
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
    """(B, T) ids of the joint vocabulary; (B, T, K) where image positions hold cells."""
    mask: Tensor | None = None
    """(B, T) true where a position is real; null where all are."""
    targets: Tensor | None = None
    """The id that each position should predict, or IGNORE, shaped as `ids`."""
    columns: int | Tensor = 0
    """Image only: columns of the grid of positions; (B, 1) where rows differ."""
    start: int | Tensor = 0
    """Image only: number of the first position, 0 being `<img>`; position p predicts code p in the order of drawing.
    (B, 1) where rows differ."""
    side: int = 1
    """Image only: codes are drawn in blocks of side x side; 1 is raster order. A segment holds whole blocks."""
    low: Tensor | None = None
    """Image only: (B, T) id of the low-resolution code that each position refines."""

    @property
    def block(self) -> int:
        """The positions of one step."""
        return self.side * self.side

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of what each position of an image predicts: (T,), or (B, T) where rows differ."""
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


def drawing_order(rows: int, columns: int, *, side: int, cell: int = 1) -> Tensor:
    """Raster places (N,) of the codes of a grid in the order in which blocks of side x side draw them.

    Args:
        cell: codes on each side of a cell, whose codes follow each other; a divisor of `side`.

    Raises:
        ConfigError: if blocks do not fill the grid, or cells a block.
    """
    if side % cell:
        raise ConfigError(f"blocks must be of whole cells of {cell}x{cell} codes, got {side}x{side}; use another block")
    if side < 1 or rows % side or columns % side:
        raise ConfigError(f"blocks of {side}x{side} codes must fill the grid, got {rows}x{columns}; use another block")
    row, column = _row_and_column(torch.arange(rows * columns // cell**2), columns=columns // cell, side=side // cell)
    inside_row, inside_column = _row_and_column(torch.arange(cell * cell), columns=cell, side=1)
    rows_N, columns_N = row[:, None] * cell + inside_row, column[:, None] * cell + inside_column
    return (rows_N * columns + columns_N).flatten()


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


def _ids(codes_BRC: Tensor, vocabulary: Vocabulary, *, side: int | None = None) -> Tensor:
    """Ids of a grid's positions in the order in which blocks of side x side codes draw them: (B, T), or (B, T, K)."""
    cell = vocabulary.cell
    order = drawing_order(*codes_BRC.shape[1:], side=side or cell, cell=cell).to(codes_BRC.device)
    ids = codes_BRC.flatten(1)[:, order] + vocabulary.first_code
    return ids if cell == 1 else ids.unflatten(1, (-1, vocabulary.slots))


def drawn_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """An image to be drawn: `<img>` and all positions but the last, each predicting the next. T is their number.

    Raises:
        ConfigError: if cells do not fill the grid.
    """
    ids = _ids(codes_BRC, vocabulary)
    start = torch.full_like(ids[:, :1], vocabulary.image_start)
    return Segment(
        modality=Modality.IMAGE,
        ids=torch.cat([start, ids[:, :-1]], dim=1),
        targets=ids,
        columns=codes_BRC.shape[2] // vocabulary.cell,
    )


def upscaled_image(low_BRC: Tensor, high_BRC: Tensor, vocabulary: Vocabulary, *, side: int) -> Segment:
    """An image to be drawn in blocks of side x side codes, after the smaller one that it refines was read.

    Raises:
        ConfigError: if blocks do not fill the grid, it is not a whole number of times the low one, or a cell refines
            more than one code.
    """
    rows, columns = high_BRC.shape[1:]
    cell, block = vocabulary.cell, (side // vocabulary.cell) ** 2
    if (factor := rows // low_BRC.shape[1]) % cell:
        raise ConfigError(f"cells of {cell}x{cell} codes must refine one code each, got a scale of {factor}")
    ids = _ids(high_BRC, vocabulary, side=side)
    low = _ids(refined_codes(low_BRC, grid=(rows, columns)), vocabulary, side=side)
    start = torch.full_like(ids[:, :block], vocabulary.image_start)
    return Segment(
        modality=Modality.IMAGE,
        ids=torch.cat([start, ids[:, :-block]], dim=1),
        targets=ids,
        columns=columns // cell,
        side=side // cell,
        low=low if cell == 1 else low[..., 0],
    )


def read_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """An image that is only read: `<img>` and all its positions."""
    return _read(codes_BRC, vocabulary, start=vocabulary.image_start)


def low_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """A low-resolution image that is read before a larger one is drawn: `<low>` and all its positions."""
    return _read(codes_BRC, vocabulary, start=vocabulary.low_start)


def _read(codes_BRC: Tensor, vocabulary: Vocabulary, *, start: int) -> Segment:
    ids = _ids(codes_BRC, vocabulary)
    begin = torch.full_like(ids[:, :1], start)
    return Segment(
        modality=Modality.IMAGE, ids=torch.cat([begin, ids], dim=1), columns=codes_BRC.shape[2] // vocabulary.cell
    )


def written_text(
    rows: Sequence[Sequence[int]], vocabulary: Vocabulary, *, hints: Sequence[Sequence[int]], end: int
) -> Segment:
    """Text that follows an image: `</img>`, a hint that is only read, and the caption, predicted, `end` last."""
    pairs = list(zip(hints, rows, strict=True))
    ids, mask = pad([[vocabulary.image_end, *hint, *row] for hint, row in pairs], fill=0)
    targets, _ = pad([[IGNORE] * len(hint) + [*row, end] for hint, row in pairs], fill=IGNORE)
    return Segment(modality=Modality.TEXT, ids=ids, mask=mask, targets=targets)
