"""Keys and values of captions, remembered: while nothing visual is in the cache, they depend on nothing trained."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch

from mars.model.cache import Prefix
from mars.model.transformer import MarsTransformer, read_prefixes

ROWS, IDS, WIDTH = 32, 512, 4
"""Captions are padded to a multiple of `WIDTH` ids and read so many at a time: `ROWS`, or fewer if they have more than
`IDS` ids together, because a batch of long captions has few of each length and would be mostly filler."""


class PrefixStore:
    """Keys and values of captions: while nothing visual is in the cache, they depend on nothing that is trained.

    Args:
        gib: memory to use; those not asked for the longest are forgotten first.
        most: the largest of the numbers that processes have, which must all read as often where they share weights.
    """

    def __init__(self, transformer: MarsTransformer, *, gib: float, most: Callable[[int], int] = int) -> None:
        self.transformer = transformer
        self.most = most
        self.limit = int(gib * 2**30)
        self.held = 0
        self.prefixes: dict[tuple[int, ...], Prefix] = {}
        self.lengths: list[int] = []
        """Of all rows that the last `get` read: what was computed."""

    @torch.no_grad()
    def get(self, rows: Sequence[Sequence[int]], *, ahead: Iterable[Sequence[int]] = ()) -> list[Prefix]:
        """The prefix of each row of ids; those not held are computed together.

        Args:
            ahead: rows that will be asked for soon. Read along when something must be read at all, as far as they fit
                into half of the memory: many captions of one length cost less than few of many lengths.
        """
        self.lengths = []
        keys = [tuple(row) for row in rows]
        found = {key: self.prefixes[key] for key in keys if key in self.prefixes}
        missing = {key for key in keys if key not in found}
        soon = self._soon(ahead) if missing and self.limit else set()
        found |= self._read_all(missing | soon)
        for key in found:
            if key in self.prefixes:
                del self.prefixes[key]
            else:
                self.held += _bytes(found[key])
            self.prefixes[key] = found[key]
        while self.held > self.limit and self.prefixes:
            self.held -= _bytes(self.prefixes.pop(next(iter(self.prefixes))))
        return [found[key] for key in keys]

    def _soon(self, ahead: Iterable[Sequence[int]]) -> set[tuple[int, ...]]:
        """Rows to read along."""
        shapes = self.transformer.config
        width = 2 * shapes.language.num_kv_heads * shapes.language.head_width * len(shapes.visual_layers)
        soon: set[tuple[int, ...]] = set()
        room = self.limit // 2
        for row in ahead:
            key = tuple(row)
            room -= 4 * len(row) * width
            if room < 0:
                break
            if key not in self.prefixes:
                soon.add(key)
        return soon

    def _read_all(self, rows: set[tuple[int, ...]]) -> dict[tuple[int, ...], Prefix]:
        batches: list[list[tuple[int, ...]]] = []
        for _, group in groupby(sorted(rows, key=lambda row: (len(row), row)), key=_padded):
            rest = list(group)
            count = _together(rest[0])
            batches += [rest[start : start + count] for start in range(0, len(rest), count)]
        found: dict[tuple[int, ...], Prefix] = {}
        others = self.most(len(batches)) - len(batches)
        for batch in batches:
            found |= self._read(batch)
        for _ in range(others):
            read_prefixes(self.transformer, [[0]])
        return found

    def _read(self, rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], Prefix]:
        """Prefixes of rows of one padded length.

        Filled up to one shape, because a product of another shape may round differently: a caption's prefix then is
        the same to the bit whatever is read beside it, so that a resumed run sees what the first one saw.
        """
        self.lengths += map(len, rows)
        filler = [(0,) * _padded(rows[0])] * (_together(rows[0]) + 1 - len(rows))
        return dict(zip(rows, read_prefixes(self.transformer, [*rows, *filler]), strict=False))


def _padded(row: Sequence[int]) -> int:
    return -(-len(row) // WIDTH) * WIDTH


def _together(row: Sequence[int]) -> int:
    """How many captions of the length of this one are read together: of its length alone, so that shapes are too."""
    return max(1, min(ROWS, IDS // _padded(row)))


def _bytes(prefix: Prefix) -> int:
    return (prefix.keys.numel() + prefix.values.numel() + prefix.last_hidden.numel()) * prefix.keys.element_size()
