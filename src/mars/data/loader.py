"""Code shards to training batches. What a batch holds is a function of the seed and its place in the run alone, so a
resumed run sees the same, and so do the processes of a run, however many they are.

Letters: B batch, R rows, C columns.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mars.data.code_table import CodeTable, Grid, read_tables
from mars.data.shards import Caption
from mars.errors import DataError

WINDOW = 64
"""Batches whose samples are sorted by length together: with more, rows of a batch are more alike, and the order of an
epoch is less random."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture and the caption chosen for it."""

    picture: int
    """Number of the picture among those of its grid, in the order of the shards."""
    codes: Tensor
    """(R, C) int64."""
    caption: Caption
    low: Tensor | None = None
    """(R / scale, C / scale) int64: the same picture, smaller."""


Length = Callable[[Caption], int]
"""Ids that a caption takes."""


def padding(lengths: Sequence[int]) -> float:
    """Share of the positions that are padding when rows of these lengths are filled up to the longest."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


class Loader:
    """Draws batches from code shards. All pictures of a batch have one grid.

    A grid has an endless sequence of samples, in which each of its pictures comes once per epoch; batches take turns
    among the grids, as often as there are pictures for them.

    Args:
        shards: code shards or folders of them; all must come from the same image tokenizer.
        kinds: how often each kind of caption is chosen, relative; kinds that are not named are never trained on.
        languages: likewise for languages.
        splits: pictures of other splits are left out.
        scale: for super-resolution: takes the pictures that have codes at a grid and at one `scale` times smaller.

    Raises:
        DataError: if a shard cannot be read, or nothing is left to train on.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        seed: int,
        kinds: Mapping[str, float],
        languages: Mapping[str, float],
        splits: Collection[str] = ("train",),
        scale: int | None = None,
    ) -> None:
        weights = {(language, kind): languages[language] * kinds[kind] for language in languages for kind in kinds}
        tables, self.image_tokenizer = read_tables(shards, splits=splits, weights=weights, scale=scale)
        if not tables:
            twice = f" and codes at two grids, one {scale} times the other," if scale is not None else ""
            raise DataError(
                f"{', '.join(map(str, shards))} hold no picture to train on with captions of {list(kinds)}{twice}; "
                f"splits: {list(splits)}"
            )
        self.seed = seed
        self.paired = scale is not None
        self.grids: tuple[Grid, ...] = tuple(tables)
        """Those of `Sample.codes`."""
        self._sequences = [
            _Sequence(table, seed=seed, tag=grid if len(tables) > 1 else ()) for grid, table in tables.items()
        ]
        self._turns: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return sum(len(sequence.table) for sequence in self._sequences)

    def batch(self, start: int, size: int, *, rank: int = 0, ranks: int = 1) -> list[Sample]:
        """Samples `start` .. `start + size` of the run, of one grid.

        Args:
            start: with several grids a multiple of `size`.
            rank: takes every sample `ranks` from number `rank` on, so that all ranks together have the whole batch.
        """
        sequence, first = self._turn(start, size)
        return [sequence.sample(index) for index in range(first + rank, first + size, ranks)]

    def batch_by_length(self, start: int, size: int, *, length: Length, rank: int = 0, ranks: int = 1) -> list[Sample]:
        """The same, but with captions of nearly equal length: the samples of `WINDOW` batches, sorted and cut anew.

        An epoch holds the same pictures with the same captions, in another order.

        Args:
            start: a multiple of `size`.
        """
        sequence, first = self._turn(start, size)
        return [sequence.sample(index) for index in sequence.by_length(first, size, length)[rank::ranks]]

    def _turn(self, start: int, size: int) -> tuple["_Sequence", int]:
        """Whose turn it is, and where in its sequence.

        By the end of epoch number e, a grid of n pictures has had e n / size batches, rounded down.
        """
        if len(self._sequences) == 1:
            return self._sequences[0], start
        number, rest = divmod(start, size)
        assert not rest, "batches of several grids have one size"
        pictures = [len(sequence.table) for sequence in self._sequences]

        def had(epoch: int) -> list[int]:
            return [epoch * count // size for count in pictures]

        epoch = number * size // sum(pictures)  # at least so many are over
        while sum(had(epoch + 1)) <= number:
            epoch += 1
        if self._turns is None or self._turns[0] != (epoch, size):
            new = [after - before for before, after in zip(had(epoch), had(epoch + 1), strict=True)]
            turns = np.repeat(np.arange(len(new)), new)
            self._turns = (epoch, size), np.random.default_rng((self.seed, 2, epoch)).permutation(turns)
        turns = self._turns[1][: number - sum(had(epoch)) + 1]
        mine = int(turns[-1])
        before = had(epoch)[mine] + int((turns[:-1] == mine).sum())
        return self._sequences[mine], before * size


class _Sequence:
    """The endless sequence of samples of one grid. Sample i is a function of the seed and i."""

    def __init__(self, table: CodeTable, *, seed: int, tag: tuple[int, ...]) -> None:
        self.table = table
        self._seed = seed
        self._tag = tag
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._window: tuple[tuple[int, int], list[list[int]]] | None = None

    def _picture(self, index: int) -> int:
        epoch, place = divmod(index, len(self.table))
        if epoch not in self._orders:
            if len(self._orders) > 1:  # two, since a window may reach over the end of an epoch
                del self._orders[min(self._orders)]
            order = np.random.default_rng((self._seed, epoch, *self._tag)).permutation(len(self.table))
            self._orders[epoch] = order
        return int(self._orders[epoch][place])

    def _caption(self, index: int) -> Caption:
        generator = np.random.default_rng((self._seed, 1, index, *self._tag))
        return self.table.choose_caption(self._picture(index), generator)

    def sample(self, index: int) -> Sample:
        """Sample number `index`."""
        picture = self._picture(index)
        codes = torch.from_numpy(self.table.codes[picture].astype(np.int64))
        low = None if self.table.low is None else torch.from_numpy(self.table.low[picture].astype(np.int64))
        return Sample(picture=picture, codes=codes, caption=self._caption(index), low=low)

    def by_length(self, first: int, size: int, length: Length) -> list[int]:
        """Numbers of the `size` samples of the batch that begins at `first`, when windows are sorted by length."""
        number, rest = divmod(first, size)
        assert not rest, "batches by length have one size"
        window, place = divmod(number, WINDOW)
        if self._window is None or self._window[0] != (window, size):
            indices = np.arange(window * WINDOW * size, (window + 1) * WINDOW * size)
            lengths = [length(self._caption(int(index))) for index in indices]
            batches = indices[np.argsort(lengths, kind="stable")].reshape(WINDOW, size)
            generator = np.random.default_rng((self._seed, 3, window, *self._tag))
            self._window = (window, size), generator.permutation(batches).tolist()
        return self._window[1][place]
