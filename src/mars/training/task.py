"""What a task is: it draws its examples, and says what predicting them costs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mars.data.documents import Document
from mars.model.costs import FlopCount
from mars.model.transformer import MarsTransformer
from mars.sequence.text import TextTokenizer
from mars.training.prefixes import PrefixStore
from mars.training.process import Process
from mars.training.setup import Loaders
from mars.training.stages import StageConfig

REMEMBERED = 2**17
"""Texts whose ids are kept."""
HELD_OUT = 64
"""Held-out pictures whose loss says which checkpoint is best."""

E = TypeVar("E")


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What all tasks of a run work with."""

    config: StageConfig
    process: Process
    transformer: MarsTransformer
    text_tokenizer: TextTokenizer
    loaders: Loaders | None
    """None where all tasks learn documents."""
    documents: Sequence[Document] = ()

    @cached_property
    def prefixes(self) -> PrefixStore:
        """Keys and values of captions."""
        return PrefixStore(self.transformer, gib=self.config.prefix_gib, most=self.process.most)

    @cached_property
    def flops(self) -> FlopCount:
        """What positions cost."""
        return FlopCount(self.transformer)

    @property
    def codes(self) -> Loaders:
        """For the tasks that learn code shards."""
        assert self.loaders is not None
        return self.loaders

    @property
    def height(self) -> int:
        """Rows of the codes that text to image draws."""
        drawn = self.codes.drawn
        rows = drawn.grids[0][0]
        return rows // self.config.upscale.scale if drawn.paired else rows

    @cached_property
    def encode(self) -> Callable[[str], list[int]]:
        """The ids of a text; those of the last texts are remembered."""
        return lru_cache(REMEMBERED)(self.text_tokenizer.encode)

    def mine(self, everything: Sequence[E]) -> list[E]:
        """What this process has of a batch that all share."""
        return list(everything[self.process.rank :: self.process.world])

    def stack(self, codes: Sequence[Tensor]) -> Tensor:
        """(B, R, C) codes of one grid, where they are computed with."""
        return torch.stack(list(codes)).to(self.process.device)


class Task(ABC, Generic[E]):
    """Something to learn. An example holds ids and codes, no states: a batch is a list of examples, and any part of it
    can be learned alone."""

    name: str

    @abstractmethod
    def draw(self, number: int, generator: torch.Generator) -> list[E]:
        """The examples that this process has of the task's batch of that number, the first being 0; the same for the
        same number and state of the generator, whatever ran before."""

    @abstractmethod
    def losses(self, batch: Sequence[E]) -> dict[str, Tensor]:
        """`total`, the mean per target that is trained on, with a graph; and figures for the log, all of them means."""

    @abstractmethod
    def targets(self, batch: Sequence[E]) -> int:
        """How many ids are predicted: what parts of a step are weighted by."""

    @abstractmethod
    def flops(self, batch: Sequence[E]) -> int:
        """Of learning a batch, forward and backward; to be asked after `losses`."""

    def held_out(self) -> list[E]:
        """Examples that this process measures and never learns; none where there are none."""
        return []
