"""Code shards to training batches. Sample number i is a function of (seed, i) alone, so a resumed run sees the same.

Letters: B batch, R rows, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mars.data.shards import Caption, CodedPicture, read_codes
from mars.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture and the caption chosen for it."""

    codes: Tensor
    """(R, C) int64."""
    caption: Caption


class Loader:
    """Draws samples from code shards, each picture once per epoch.

    Args:
        shards: code shards; all must come from the same image tokenizer.
        kinds: how often each kind of caption is chosen, relative; kinds that are not named are never trained on.
        languages: likewise for languages.
        splits: which pictures are drawn from.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        seed: int,
        kinds: Mapping[str, float],
        languages: Mapping[str, float],
        splits: Sequence[str] = ("train",),
    ) -> None:
        coded: list[CodedPicture] = []
        digests = set()
        for shard in shards:
            found, digest = read_codes(shard)
            coded += [item for item in found if item.record.split in splits]
            digests.add(digest)
        if len(digests) > 1:
            raise DataError(f"code shards must come from one image tokenizer, got {len(digests)}: encode them again")
        self.image_tokenizer = digests.pop() if digests else ""
        self.choices: list[tuple[Tensor, list[Caption], np.ndarray[tuple[int], np.dtype[np.float64]]]] = []
        for item in coded:
            weights = np.array([self._weight(caption, kinds, languages) for caption in item.record.captions])
            if weights.sum() > 0:
                codes = torch.from_numpy(item.codes.astype(np.int64))
                self.choices.append((codes, list(item.record.captions), weights / weights.sum()))
        if not self.choices:
            raise DataError(f"{', '.join(map(str, shards))} hold no picture to train on with captions of {list(kinds)}")
        if len(grids := {tuple(codes.shape) for codes, *_ in self.choices}) > 1:
            raise DataError(f"pictures of one stage must share one code grid, got {sorted(grids)}; use other shards")
        self.grids = [(int(rows), int(columns)) for rows, columns in grids]
        """(rows, columns) of the pictures' codes."""
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @staticmethod
    def _weight(caption: Caption, kinds: Mapping[str, float], languages: Mapping[str, float]) -> float:
        return kinds.get(caption.kind, 0.0) * languages.get(caption.language, 0.0)

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return len(self.choices)

    def sample(self, index: int) -> Sample:
        """Sample number `index` of the endless sequence."""
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self._epoch = epoch
        codes, captions, weights = self.choices[self._order[place]]
        chosen = np.random.default_rng((self.seed, 1, index)).choice(len(captions), p=weights)
        return Sample(codes=codes, caption=captions[chosen])

    def batch(self, start: int, size: int) -> list[Sample]:
        """Samples `start` .. `start + size`."""
        return [self.sample(index) for index in range(start, start + size)]
