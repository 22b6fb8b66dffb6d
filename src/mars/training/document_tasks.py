"""Learning documents: editing, and texts and images in any order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mars.data.documents import CodedImage, Document, DocumentLoader
from mars.errors import DataError
from mars.sequence.interleaved import ImagePart, Part, TextPart, count_targets, interleaved, shape_of
from mars.sequence.layout import IGNORE
from mars.training.interleaved import interleaved_losses
from mars.training.task import HELD_OUT, Task, TaskContext


@dataclass(frozen=True, kw_only=True)
class Page:
    """A document as ids and codes."""

    parts: tuple[Part, ...]


class Interleaved(Task[Page]):
    """Draws and writes what follows in documents without a source image.

    Raises:
        ConfigError: if their images are too large for the model.
        DataError: if none of them can be learned by the task.
    """

    name = "interleaved"

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        config = context.config
        mine = [document for document in context.documents if self._is_mine(document)]
        self.loader = DocumentLoader((one for one in mine if one.split == "train"), seed=config.seed)
        self._measured = [one for one in mine if one.split in config.data.held_out][:HELD_OUT]
        if not len(self.loader):
            where = ", ".join(map(str, config.data.documents))
            raise DataError(f"{where} hold no document of the split train for tasks.{self.name}")
        for grid in {part.codes.shape for one in mine for part in one.parts if isinstance(part, CodedImage)}:
            context.transformer.config.semvie.check_grid(*grid)

    def _is_mine(self, document: Document) -> bool:
        return not document.is_edit

    def _page(self, document: Document, *, dropped: bool = False) -> Page:
        """With `dropped`, texts that are only read are emptied."""
        parts: list[Part] = []
        for place, part in enumerate(document.parts):
            if isinstance(part, CodedImage):
                parts.append(ImagePart(codes_RC=torch.from_numpy(part.codes).long(), role=part.role))
                continue
            ids = [] if dropped and not part.learned else self.context.encode(part.text)
            if place == 0:
                ids = [self.context.text_tokenizer.bos_id, *ids]
            parts.append(TextPart(ids=tuple(ids), learned=part.learned))
        return Page(parts=tuple(parts))

    def draw(self, number: int, generator: torch.Generator) -> list[Page]:  # noqa: ARG002
        """Documents of one layout."""
        return [self._page(document) for document in self._batch(number)]

    def _batch(self, number: int) -> list[Document]:
        process = self.context.process
        return self.loader.batch(number, self.context.config.batch_size, rank=process.rank, ranks=process.world)

    def held_out(self) -> list[Page]:
        """The first held-out documents."""
        count = len(self._measured) - len(self._measured) % self.context.process.world  # all processes have as many
        return [self._page(document) for document in self.context.mine(self._measured[:count])]

    def losses(self, batch: Sequence[Page]) -> dict[str, Tensor]:
        """Of codes and text ids, and of `<img>` where an image follows a text."""
        layouts: dict[tuple[tuple[str, ...], ...], list[Page]] = {}
        for page in batch:
            layouts.setdefault(shape_of(page.parts), []).append(page)
        whole, sums = self.targets(batch), dict[str, Tensor]()
        for pages in layouts.values():
            share = self.targets(pages) / whole
            for name, value in self._losses(pages).items():
                sums[name] = sums.get(name, value.new_zeros(())) + share * value
        return sums

    def _losses(self, pages: Sequence[Page]) -> dict[str, Tensor]:
        context, config = self.context, self.context.config
        segments = interleaved(
            [page.parts for page in pages], context.transformer.vocabulary, end=context.text_tokenizer.eos_id
        )
        on_device = [segment.to(context.process.device) for segment in segments]
        losses = interleaved_losses(context.transformer, on_device, z_loss=config.z_loss)
        if (begin := losses.get("begin_image_loss")) is not None:
            losses["total"] = losses["total"] + config.special_weight * begin
        return {name: value if name == "total" else value.detach() for name, value in losses.items()}

    def targets(self, batch: Sequence[Page]) -> int:
        """Codes and text ids."""
        return sum(count_targets(page.parts) for page in batch)

    def flops(self, batch: Sequence[Page]) -> int:
        """Of every document alone; padding is not counted."""
        vocabulary, flops = self.context.transformer.vocabulary, 0
        for page in batch:
            counts = []
            for segment in interleaved([page.parts], vocabulary, end=self.context.text_tokenizer.eos_id):
                targets = [] if segment.targets is None else segment.targets.flatten().tolist()
                predicted = sum(target not in (IGNORE, vocabulary.image_start) for target in targets)
                counts.append((segment.modality, segment.ids.shape[1], predicted))
            flops += self.context.flops.train_document(counts)
        return flops


class Editing(Interleaved):
    """Draws what an instruction makes of a source image."""

    name = "editing"

    def _is_mine(self, document: Document) -> bool:
        return document.is_edit

    def draw(self, number: int, generator: torch.Generator) -> list[Page]:
        """Instructions are emptied as often as captions are, so that guidance can be used."""
        config, process = self.context.config, self.context.process
        rates = torch.rand(config.batch_size, generator=generator)[process.rank :: process.world]
        dropped = (rates < config.guidance_dropout).tolist()
        return [self._page(one, dropped=drop) for one, drop in zip(self._batch(number), dropped, strict=True)]
