"""Documents: texts and images in any order, as one list of segments.

    editing      [ image: <source> s0 ... s(N-1) ] [ text: </source> instruction ] [ image: <img> c0 ... c(N-2) ]
    interleaved  [ text ] [ image: <img> c0 ... c(N-1) ] [ text: </img> text ] [ image: <img> ... ] ...

What ends an image belongs to the text after it; between two images stands a text of that id alone. The last position of
a text before an image that is drawn predicts `<img>`. Text before the first image is only read, but for that: what it
predicts depends on nothing that is trained. An image that ends its document runs without its last code, to which
nothing looks back.

Letters: B batch, T positions, R rows, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mars.sequence.layout import IGNORE, Modality, Segment, drawn_image, pad, read_image
from mars.sequence.vocabulary import Vocabulary

Role = Literal["drawn", "read", "source"]
"""Of an image: `drawn` is predicted, `read` is looked at, `source` is what an instruction changes (`<source>`)."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A text of a document."""

    ids: tuple[int, ...]
    """At least one where the document begins with it."""
    learned: bool = True
    """Whether its ids are predicted; `<img>` after it is in any case."""


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """An image of a document."""

    codes_RC: Tensor
    role: Role = "drawn"


Part = TextPart | ImagePart
Document = Sequence[Part]
"""No two texts stand side by side."""


def shape_of(document: Document) -> tuple[tuple[str, ...], ...]:
    """What documents must share to be rows of one batch: the order of their parts; roles and grids of images."""
    return tuple(
        ("text",) if isinstance(part, TextPart) else (part.role, *map(str, part.codes_RC.shape)) for part in document
    )


def interleaved(documents: Sequence[Document], vocabulary: Vocabulary, *, end: int) -> list[Segment]:
    """The segments of documents of one shape, a row each.

    Args:
        end: the text id that ends a document's last text.
    """
    assert len({shape_of(document) for document in documents}) == 1, "documents of a batch have one shape"
    columns = list(zip(*map(_alternating, documents), strict=True))
    neighbours = [None, *(parts[0] for parts in columns), None]
    segments = []
    for parts, before, after in zip(columns, neighbours, neighbours[2:], strict=False):
        texts = [part for part in parts if isinstance(part, TextPart)]
        if texts:
            segments.append(_text(texts, before, after, vocabulary, end=end))
        else:
            images = [part for part in parts if isinstance(part, ImagePart)]
            segments.append(_image(images, vocabulary, last=after is None))
    return segments


def count_targets(document: Document) -> int:
    """How many codes and text ids a document predicts; `<img>` is not counted."""
    count = 0
    for place, part in enumerate(document):
        if isinstance(part, ImagePart):
            count += part.codes_RC.numel() if part.role == "drawn" else 0
        elif part.learned and place:
            count += len(part.ids) + (place == len(document) - 1)
    return count


def _alternating(document: Document) -> list[Part]:
    """With a text between any two images."""
    parts = list(document[:1])
    for one, other in pairwise(document):
        assert not (isinstance(one, TextPart) and isinstance(other, TextPart)), "two texts are one text"
        if isinstance(one, ImagePart) and isinstance(other, ImagePart):
            parts.append(TextPart(ids=(), learned=False))
        parts.append(other)
    return parts


def _text(
    parts: Sequence[TextPart], before: Part | None, after: Part | None, vocabulary: Vocabulary, *, end: int
) -> Segment:
    opening: list[int] = []
    if isinstance(before, ImagePart):
        opening = [vocabulary.source_end if before.role == "source" else vocabulary.image_end]
    draws = isinstance(after, ImagePart) and after.role == "drawn"
    rows, wanted = [], []
    for part in parts:
        row, learned = [*opening, *part.ids], part.learned and before is not None
        assert row, "a document that begins with a text has an id in it"
        last = vocabulary.image_start if draws else end if learned and after is None else IGNORE
        rows.append(row)
        wanted.append([*(row[1:] if learned else [IGNORE] * (len(row) - 1)), last])
    ids, mask = pad(rows, fill=0)
    return Segment(modality=Modality.TEXT, ids=ids, mask=mask, targets=pad(wanted, fill=IGNORE)[0])


def _image(parts: Sequence[ImagePart], vocabulary: Vocabulary, *, last: bool) -> Segment:
    codes_BRC = torch.stack([part.codes_RC for part in parts])
    if parts[0].role != "drawn":
        segment = read_image(codes_BRC, vocabulary)
        if parts[0].role == "source":
            segment.ids[:, 0] = vocabulary.source_start
        return segment
    drawn = drawn_image(codes_BRC, vocabulary)
    assert drawn.targets is not None
    if last:
        return drawn
    targets = torch.cat([drawn.targets, torch.full_like(drawn.targets[:, :1], IGNORE)], dim=1)
    return replace(read_image(codes_BRC, vocabulary), targets=targets)
