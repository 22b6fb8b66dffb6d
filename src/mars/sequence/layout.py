"""How text and images become one sequence: a list of segments, each of one modality.

    text to image   [ text: caption                 ] [ image: <img> c0 c1 ... ]
    captioning      [ image: <img> c0 c1 ... c(N-1) ] [ text: </img> caption   ]

`<img>` belongs to the image (it predicts the first code, so the trained expert runs it); `</img>` belongs to the text.
Rows of a batch are padded on the right; `mask` says which positions are real.

Letters: B batch, T positions, R rows, C columns, N = R * C codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

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
    columns: int = 0
    """Image only: columns of the code grid."""
    start: int = 0
    """Image only: place of the first position, 0 being `<img>`; position p predicts code p in raster order."""

    def to(self, device: torch.device) -> "Segment":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, Tensor)
        }
        return replace(self, **moved)


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


def read_image(codes_BRC: Tensor, vocabulary: Vocabulary) -> Segment:
    """An image that is only read: `<img>` and all codes. T = N + 1."""
    ids = codes_BRC.flatten(1) + vocabulary.first_code
    start = ids.new_full((len(ids), 1), vocabulary.image_start)
    return Segment(modality=Modality.IMAGE, ids=torch.cat([start, ids], dim=1), columns=codes_BRC.shape[2])


def written_text(
    rows: Sequence[Sequence[int]], vocabulary: Vocabulary, *, hints: Sequence[Sequence[int]], end: int
) -> Segment:
    """Text that follows an image: `</img>`, a hint that is only read, and the caption, predicted, `end` last."""
    pairs = list(zip(hints, rows, strict=True))
    ids, mask = pad([[vocabulary.image_end, *hint, *row] for hint, row in pairs], fill=0)
    targets, _ = pad([[IGNORE] * len(hint) + [*row, end] for hint, row in pairs], fill=IGNORE)
    return Segment(modality=Modality.TEXT, ids=ids, mask=mask, targets=targets)
