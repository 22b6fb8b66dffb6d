"""What a step can learn: a task draws its examples, and says what predicting them costs.

Which task a step learns, and on what, are functions of the seed and the step's number alone.

Letters: R rows, C columns, B batch.
"""

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mars.data.loader import Loader, Sample
from mars.errors import ConfigError
from mars.model.costs import FlopCount
from mars.model.transformer import MarsTransformer
from mars.sequence.text import CAPTION_HINTS, TextTokenizer
from mars.training.cross_entropy import token_loss
from mars.training.losses import begin_image_loss, captioning_states, text_to_image_states
from mars.training.prefixes import PrefixStore
from mars.training.process import Process
from mars.training.stages import StageConfig

LOOKAHEAD = 24
"""Steps whose captions are read at once."""
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
    loader: Loader
    held_out: Loader | None
    ids: dict[str, list[int]] = field(default_factory=dict)
    """Of every text seen so far."""

    @cached_property
    def prefixes(self) -> PrefixStore:
        """Keys and values of captions."""
        return PrefixStore(self.transformer, gib=self.config.prefix_gib)

    @cached_property
    def flops(self) -> FlopCount:
        """What positions cost."""
        return FlopCount(self.transformer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        if text not in self.ids:
            self.ids[text] = self.text_tokenizer.encode(text)
        return self.ids[text]

    def mine(self, everything: Sequence[E]) -> list[E]:
        """What this process has of a batch that all share."""
        return list(everything[self.process.rank :: self.process.world])

    def samples(self, step: int, count: int) -> list[Sample]:
        """What this process has of the `count` samples of a step."""
        return self.mine(self.loader.batch(step * count, count))

    def stack(self, codes: Sequence[Tensor]) -> Tensor:
        """(B, R, C) codes of one grid, where they are computed with."""
        return torch.stack(list(codes)).to(self.process.device)


class Task(ABC, Generic[E]):
    """Something to learn. An example holds ids and codes, no states: a batch is a list of examples, and any part of it
    can be learned alone."""

    name: str

    @abstractmethod
    def draw(self, step: int, generator: torch.Generator) -> list[E]:
        """The examples that this process has of a step; the same for the same step, whatever ran before."""

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


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture to be drawn after a prompt."""

    codes: Tensor
    """(R, C)."""
    prompt: list[int]


class TextToImage(Task[Drawing]):
    """Draws a picture after its caption, and learns where to begin one.

    Args:
        ahead: prompts of the next steps, whose prefixes are cheaper to read together.
    """

    name = "text_to_image"

    def __init__(self, context: TaskContext, *, ahead: Callable[[], Iterator[list[int]]]) -> None:
        self.context = context
        self.ahead = ahead
        self.read = 0
        """FLOPs of the captions that the last batch had read."""

    def rows_of(self, height: int) -> int:
        """How many rows of a picture are drawn."""
        return height

    def draw(self, step: int, generator: torch.Generator) -> list[Drawing]:
        """Captions are emptied as often as the configuration says."""
        config, height = self.context.config, self.context.loader.grids[0][0]
        rows = self.rows_of(height)
        count = config.batch_size * height // rows
        dropped = self.context.mine((torch.rand(count, generator=generator) < config.guidance_dropout).tolist())
        return [
            self._drawing(sample.codes[:rows], "" if drop else sample.caption.text)
            for sample, drop in zip(self.context.samples(step, count), dropped, strict=True)
        ]

    def _drawing(self, codes_RC: Tensor, text: str) -> Drawing:
        return Drawing(codes=codes_RC, prompt=[self.context.text_tokenizer.bos_id, *self.context.encode(text)])

    def held_out(self) -> list[Drawing]:
        """The first held-out pictures, each with one of its captions."""
        loader = self.context.held_out
        if loader is None:
            return []
        count = min(HELD_OUT, len(loader))
        count -= count % self.context.process.world  # all processes have as many
        samples = self.context.mine(loader.batch(0, count)) if count else []
        return [self._drawing(sample.codes, sample.caption.text) for sample in samples]

    def losses(self, batch: Sequence[Drawing]) -> dict[str, Tensor]:
        """Of the codes, and of `<img>` after the caption."""
        context, config = self.context, self.context.config
        before = len(context.prefixes.lengths)
        prefixes = context.prefixes.get([one.prompt for one in batch], ahead=self.ahead())
        self.read = sum(context.flops.read_text(length) for length in context.prefixes.lengths[before:])
        states_ND, targets_N = text_to_image_states(
            context.transformer, context.stack([one.codes for one in batch]), prefixes
        )
        found = token_loss(states_ND, context.transformer.visual_table, targets_N, z_loss=config.z_loss)
        begin = begin_image_loss(context.transformer, prefixes)
        return {
            "total": found.loss + config.special_weight * begin,
            "loss": found.nats,
            "begin_image_loss": begin.detach(),
            "logit_norm": found.logit_norm,
        }

    def targets(self, batch: Sequence[Drawing]) -> int:
        """Codes."""
        return sum(one.codes.numel() for one in batch)

    def flops(self, batch: Sequence[Drawing]) -> int:
        """Captions count where they were read."""
        count = self.context.flops
        drawn = sum(
            count.train_text_to_image(caption=len(one.prompt), codes=one.codes.numel())
            - count.read_text(len(one.prompt))
            for one in batch
        )
        return drawn + self.read


class TopRows(TextToImage):
    """Draws the first rows of codes only, of as many more pictures."""

    name = "top_rows"

    def rows_of(self, height: int) -> int:
        """As the configuration says."""
        return min(self.context.config.top_rows, height)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A picture and the caption to be written of it."""

    codes: Tensor
    """(R, C)."""
    hint: list[int]
    caption: list[int]


class Captioning(Task[Reading]):
    """Writes the caption of a picture, in the caption's language."""

    name = "captioning"

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def draw(self, step: int, generator: torch.Generator) -> list[Reading]:  # noqa: ARG002
        """Whole pictures and their captions."""
        encode = self.context.encode
        return [
            Reading(codes=one.codes, hint=encode(CAPTION_HINTS[one.caption.language]), caption=encode(one.caption.text))
            for one in self.context.samples(step, self.context.config.batch_size)
        ]

    def losses(self, batch: Sequence[Reading]) -> dict[str, Tensor]:
        """Of the caption's ids and of its end."""
        transformer, codes_BRC = self.context.transformer, self.context.stack([one.codes for one in batch])
        states_ND, targets_N = captioning_states(
            transformer,
            codes_BRC,
            [one.caption for one in batch],
            hints=[one.hint for one in batch],
            end=self.context.text_tokenizer.eos_id,
        )
        found = token_loss(states_ND, transformer.text_table, targets_N, z_loss=self.context.config.z_loss)
        return {"total": found.loss, "loss": found.nats, "logit_norm": found.logit_norm}

    def targets(self, batch: Sequence[Reading]) -> int:
        """Text ids."""
        return sum(len(one.caption) + 1 for one in batch)

    def flops(self, batch: Sequence[Reading]) -> int:
        """Hints count as the caption's."""
        count = self.context.flops
        return sum(
            count.train_captioning(caption=len(one.hint) + len(one.caption), codes=one.codes.numel()) for one in batch
        )


class TaskMix:
    """The tasks of a run, each as often as its share of the steps."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.shares = dict(sorted(context.config.mix.items()))
        self.step = 0
        known: dict[str, Callable[[], Task[Any]]] = {
            "text_to_image": lambda: TextToImage(context, ahead=self.prompts_ahead),
            "top_rows": lambda: TopRows(context, ahead=self.prompts_ahead),
            "captioning": lambda: Captioning(context),
        }
        for name in self.shares:
            if name not in known:
                raise ConfigError(f"tasks.{name} cannot be trained yet; known tasks are {', '.join(known)}")
        self.tasks = {name: known[name]() for name in self.shares}
        self.main = self.tasks[max(self.shares, key=lambda name: self.shares[name])]
        """The task that most steps learn: its loss says which checkpoint is best."""

    def draw(self, step: int) -> tuple[Task[Any], list[Any]]:
        """The task of a step, and the examples that this process has of it."""
        self.step = step
        return self._draw(step)

    def _draw(self, step: int) -> tuple[Task[Any], list[Any]]:
        generator = torch.Generator().manual_seed(self.context.config.seed * 1_000_003 + step)
        edges = list(accumulate(self.shares.values()))[:-1]
        task = list(self.tasks.values())[bisect(edges, float(torch.rand((), generator=generator)))]
        return task, task.draw(step, generator)

    def prompts_ahead(self) -> Iterator[list[int]]:
        """Prompts of the steps after the one that was drawn last."""
        for step in range(self.step + 1, min(self.step + LOOKAHEAD, self.context.config.steps)):
            yield from (one.prompt for one in self._draw(step)[1] if isinstance(one, Drawing))
