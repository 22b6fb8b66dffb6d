"""The tasks, and which of them a step learns.

Which task a step learns, and on what, are functions of the seed and the step's number alone.

Letters: R rows, C columns, B batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mars.data.loader import Loader, Sample, padding
from mars.data.shards import Caption
from mars.errors import ConfigError
from mars.model.cache import Prefix
from mars.sequence.text import CAPTION_HINTS
from mars.training.cross_entropy import token_loss
from mars.training.document_tasks import Editing, Interleaved
from mars.training.losses import begin_image_loss, captioning_states, text_to_image_states
from mars.training.task import HELD_OUT, Task, TaskContext
from mars.training.upscale import upscale_states

CYCLE = 1000
"""Steps in which each task has exactly its share."""
LOOKAHEAD = 24
"""Steps whose captions are read at once."""


def _small(sample: Sample) -> Tensor:
    """The codes (R, C) of every task but `upscale`: of a pair of grids, the smaller."""
    return sample.codes if sample.low is None else sample.low


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture to be drawn after a prompt."""

    codes: Tensor
    """(R, C)."""
    prompt: list[int]

    @property
    def read(self) -> int:
        """Image positions that are read between prompt and picture."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Refining(Drawing):
    """A picture to be drawn again, larger."""

    low: Tensor
    """(R / scale, C / scale)."""
    slots: int
    """Codes of a position."""

    @property
    def read(self) -> int:
        """`<low>` and the smaller picture."""
        return self.low.numel() // self.slots + 1


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

    @property
    def loader(self) -> Loader:
        """Of the pictures that are drawn."""
        return self.context.codes.drawn

    def size(self) -> tuple[int, int | None]:
        """Pictures of a step, and how many rows of each are drawn; null is all."""
        return self.context.config.batch_size, None

    def draw(self, number: int, generator: torch.Generator) -> list[Drawing]:
        """Captions are emptied as often as the configuration says."""
        context, loader, (count, rows) = self.context, self.loader, self.size()
        share = context.config.guidance_dropout
        dropped = context.mine((torch.rand(count, generator=generator) < share).tolist())
        samples = loader.batch(number * count, count, rank=context.process.rank, ranks=context.process.world)
        return [
            self._example(sample, "" if drop else sample.caption.text, rows=rows)
            for sample, drop in zip(samples, dropped, strict=True)
        ]

    def _example(self, sample: Sample, text: str, *, rows: int | None = None) -> Drawing:
        return Drawing(codes=_small(sample)[:rows], prompt=self._prompt(text))

    def _prompt(self, text: str) -> list[int]:
        return [self.context.text_tokenizer.bos_id, *self.context.encode(text)]

    def held_out(self) -> list[Drawing]:
        """The first held-out pictures, each with one of its captions."""
        loader = self.context.codes.held_out
        if loader is None:
            return []
        count = min(HELD_OUT, len(loader))
        count -= count % self.context.process.world  # all processes have as many
        if not count:
            return []
        samples = loader.batch(0, count, rank=self.context.process.rank, ranks=self.context.process.world)
        return [self._example(sample, sample.caption.text) for sample in samples]

    def losses(self, batch: Sequence[Drawing]) -> dict[str, Tensor]:
        """Of the codes, and of `<img>` after the caption."""
        context, config = self.context, self.context.config
        prefixes = context.prefixes.get([one.prompt for one in batch], ahead=self.ahead())
        self.read = sum(context.flops.read_text(length) for length in context.prefixes.lengths)
        states_ND, targets_N = self._states(batch, prefixes)
        found = token_loss(states_ND, context.transformer.visual_table, targets_N, z_loss=config.z_loss)
        begin = begin_image_loss(context.transformer, prefixes)
        return {
            "total": found.loss + config.special_weight * begin,
            "loss": found.nats,
            "begin_image_loss": begin.detach(),
            "logit_norm": found.logit_norm,
        }

    def _states(self, batch: Sequence[Drawing], prefixes: Sequence[Prefix]) -> tuple[Tensor, Tensor]:
        codes_BRC = self.context.stack([one.codes for one in batch])
        return text_to_image_states(self.context.transformer, codes_BRC, prefixes)

    def targets(self, batch: Sequence[Drawing]) -> int:
        """Codes."""
        return sum(one.codes.numel() for one in batch)

    def flops(self, batch: Sequence[Drawing]) -> int:
        """Captions count where they were read."""
        count = self.context.flops
        drawn = sum(
            count.train_text_to_image(caption=len(one.prompt), codes=one.codes.numel(), low=one.read)
            - count.read_text(len(one.prompt))
            for one in batch
        )
        return drawn + self.read


class TopRows(TextToImage):
    """Draws the first rows of codes only, of as many more pictures."""

    name = "top_rows"

    def size(self) -> tuple[int, int | None]:
        """As many codes as a step of whole pictures has, where these have the first grid."""
        config, height = self.context.config, self.context.height
        rows = min(config.top_rows, height)
        return config.batch_size * height // rows, rows


class Upscale(TextToImage):
    """Draws a picture again, larger, after its caption and its smaller codes: the next K codes at once (ours)."""

    name = "upscale"

    @property
    def loader(self) -> Loader:
        """Of pictures in two sizes."""
        assert self.context.codes.pairs is not None
        return self.context.codes.pairs

    def held_out(self) -> list[Drawing]:
        """As the others, if they have both sizes."""
        return super().held_out() if self.loader is self.context.codes.drawn else []

    def _example(self, sample: Sample, text: str, *, rows: int | None = None) -> Refining:
        assert sample.low is not None
        assert rows is None
        slots = self.context.transformer.vocabulary.slots
        return Refining(codes=sample.codes, low=sample.low, prompt=self._prompt(text), slots=slots)

    def _states(self, batch: Sequence[Drawing], prefixes: Sequence[Prefix]) -> tuple[Tensor, Tensor]:
        context = self.context
        low_BRC = context.stack([one.low for one in batch if isinstance(one, Refining)])
        high_BRC = context.stack([one.codes for one in batch])
        return upscale_states(context.transformer, low_BRC, high_BRC, prefixes, side=context.config.upscale.side)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A picture and the caption to be written of it."""

    codes: Tensor
    """(R, C)."""
    hint: list[int]
    caption: list[int]


class Captioning(Task[Reading]):
    """Writes the caption of a picture, in the caption's language.

    Raises:
        ConfigError: if the configuration asks for captions in a language that has no hint.
    """

    name = "captioning"

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        for language, share in context.config.data.languages.items():
            if share and language not in CAPTION_HINTS:
                raise ConfigError(
                    f"data.languages must be some of {', '.join(CAPTION_HINTS)} for tasks.captioning, got {language}; "
                    "leave the task or the language out"
                )

    def draw(self, number: int, generator: torch.Generator) -> list[Reading]:  # noqa: ARG002
        """Whole pictures and their captions, of nearly equal length: the text is most of the work, and so padding."""
        context, count = self.context, self.context.config.batch_size
        samples = context.codes.described.batch_by_length(
            number * count,
            count,
            length=lambda caption: len(self._hint(caption)) + len(context.encode(caption.text)),
            rank=context.process.rank,
            ranks=context.process.world,
        )
        return [
            Reading(codes=_small(one), hint=self._hint(one.caption), caption=context.encode(one.caption.text))
            for one in samples
        ]

    def _hint(self, caption: Caption) -> list[int]:
        return self.context.encode(CAPTION_HINTS[caption.language])

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
        empty = padding([len(one.hint) + len(one.caption) for one in batch])
        return {
            "total": found.loss,
            "loss": found.nats,
            "logit_norm": found.logit_norm,
            "padding": found.loss.new_tensor(empty),
        }

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
    """The tasks of a run, each as often as its share of the steps: exactly so in every `CYCLE` of them.

    A task's batches are numbered, so that each task sees every picture once per epoch of its own.
    """

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        shares = dict(sorted(context.config.mix.items()))
        most = max(shares, key=lambda name: shares[name])
        self.counts = {name: max(1, round(share * CYCLE)) for name, share in shares.items()}
        """Steps of each task in a cycle."""
        self.counts[most] += CYCLE - sum(self.counts.values())
        self.turns: dict[int, list[str]] = {}
        self.step = 0
        known: dict[str, Callable[[], Task[Any]]] = {
            "text_to_image": lambda: TextToImage(context, ahead=self.prompts_ahead),
            "top_rows": lambda: TopRows(context, ahead=self.prompts_ahead),
            "captioning": lambda: Captioning(context),
            "upscale": lambda: Upscale(context, ahead=self.prompts_ahead),
            "editing": lambda: Editing(context),
            "interleaved": lambda: Interleaved(context),
        }
        self.tasks = {name: known[name]() for name in shares}
        self.main = self.tasks[most]
        """The task that most steps learn: its loss says which checkpoint is best."""

    def draw(self, step: int) -> tuple[Task[Any], list[Any]]:
        """The task of a step, and the examples that this process has of it."""
        self.step = step
        return self._draw(step)

    def _draw(self, step: int) -> tuple[Task[Any], list[Any]]:
        cycle, place = divmod(step, CYCLE)
        name = self._turns(cycle)[place]
        number = cycle * self.counts[name] + self._turns(cycle)[:place].count(name)
        task, seed = self.tasks[name], self.context.config.seed
        return task, task.draw(number, torch.Generator().manual_seed(seed * 1_000_003 + step))

    def _turns(self, cycle: int) -> list[str]:
        """The names of the tasks of a cycle, in order."""
        if cycle not in self.turns:
            names = [name for name, count in self.counts.items() for _ in range(count)]
            generator = torch.Generator().manual_seed(self.context.config.seed * 1_000_003 + cycle)
            order = torch.randperm(CYCLE, generator=generator).tolist()
            self.turns = {cycle: [names[index] for index in order]}
        return self.turns[cycle]

    def prompts_ahead(self) -> Iterator[list[int]]:
        """Prompts of the steps after the one that was drawn last."""
        for step in range(self.step + 1, min(self.step + LOOKAHEAD, self.context.config.steps)):
            yield from (one.prompt for one in self._draw(step)[1] if isinstance(one, Drawing))
