"""Text out: what the base LLM answers, and documents in which text and pictures take turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from mars.checkpoint import MarsModel
from mars.errors import PromptError
from mars.generation.engine import continue_text
from mars.generation.joint import Drew, DrewRow, WriteRequest, Wrote, write
from mars.generation.sampling import Sampling
from mars.picture import GeneratedImage, open_picture
from mars.pipeline.checks import all_seeds
from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.sequence.interleaved import ImagePart, Part, TextPart
from mars.sequence.text import TextTokenizer

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

Said = str | Path | Image.Image
"""A text, or a picture: its file or itself."""


@dataclass(frozen=True)
class Words:
    """Another piece of text."""

    text: str


@dataclass(frozen=True)
class HalfDrawn:
    """A picture half-way: rows that are not drawn yet are empty."""

    image: Image.Image


@dataclass(frozen=True)
class Painted:
    """A picture that is done."""

    image: GeneratedImage


Piece = Words | HalfDrawn | Painted


@dataclass
class Speaker:
    """Ids to text, piece by piece: half a character waits for its other bytes."""

    tokenizer: TextTokenizer
    ids: list[int] = field(default_factory=list)
    told: str = ""

    def say(self, token: int) -> str:
        """What can be told after another id."""
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids)
        return "" if whole.endswith("\ufffd") else self._tell(whole)

    def rest(self) -> str:
        """What waited in vain."""
        return self._tell(self.tokenizer.decode(self.ids))

    def _tell(self, whole: str) -> str:
        piece, self.told = whole[len(self.told) :], whole
        return piece


def answer(model: MarsModel, text: str, *, system: str, max_tokens: int, emit: Callable[[str], None] | None) -> str:
    """The likeliest answer; arguments and errors are those of `MarsPipeline.chat`."""
    if not text.strip():
        raise PromptError("the text must not be empty; say something")
    tokenizer = model.text_tokenizer
    speaker = Speaker(tokenizer)

    def tell(token: int) -> None:
        if (piece := speaker.say(token)) and emit is not None:
            emit(piece)

    ids = continue_text(
        model.transformer,
        tokenizer.apply_chat(text, system=system),
        max_tokens=max_tokens,
        end=(tokenizer.eos_id,),
        emit=tell,
    )
    if (piece := speaker.rest()) and emit is not None:
        emit(piece)
    return tokenizer.decode(ids)


def document(
    pipe: "MarsPipeline",
    parts: Said | Sequence[Said],
    *,
    max_tokens: int = 128,
    max_images: int = 4,
    seed: int | None = None,
    writing: Sampling | None = None,
    drawing: Sampling = DEFAULT_SAMPLING,
    previews: bool = False,
) -> Iterator[Piece]:
    """What the model writes and paints; arguments and errors are those of `MarsPipeline.write`."""
    tokenizer, grid = pipe.model.text_tokenizer, pipe.model.info.grids[0]
    number = all_seeds(seed, prompts=1, n=1)[0]
    request = WriteRequest(
        parts=_read(pipe, [parts] if isinstance(parts, Said) else parts),
        end=(tokenizer.eos_id,),
        grid=(grid[0], grid[1]),
        free=(tokenizer.bos_id,),
        max_tokens=max_tokens,
        max_images=max_images,
        writing=writing or Sampling(temperature=0),
        drawing=replace(drawing, candidates=1),
        seed=number,
    )
    return _pieces(pipe, write(pipe.model.transformer, request), request, previews=previews)


def _pieces(
    pipe: "MarsPipeline", events: Iterator[Wrote | DrewRow | Drew], request: WriteRequest, *, previews: bool
) -> Iterator[Piece]:
    speaker, images = Speaker(pipe.model.text_tokenizer), 0
    settings = {"joint": asdict(request.drawing)}
    for event in events:
        match event:
            case Wrote():
                if piece := speaker.say(event.id):
                    yield Words(piece)
            case DrewRow():
                if previews:
                    yield HalfDrawn(pipe.preview(event.codes, rows=request.grid[0]))
            case Drew():
                if piece := speaker.rest():
                    yield Words(piece)
                yield Painted(_painted(pipe, event.codes, seed=request.seed + images, settings=settings, said=speaker))
                images += 1
                speaker = Speaker(pipe.model.text_tokenizer)
    if piece := speaker.rest():
        yield Words(piece)


def _painted(
    pipe: "MarsPipeline", codes: Tensor, *, seed: int, settings: Mapping[str, object], said: Speaker
) -> GeneratedImage:
    """A picture, whose prompt is the text right before it that the model wrote."""
    return GeneratedImage(pipe.decode(codes[None])[0], pipe.about(said.told.strip(), seed, settings))


def _read(pipe: "MarsPipeline", parts: Sequence[Said]) -> list[Part]:
    """Texts and pictures as ids and codes; the first text begins with the beginning-of-text id."""
    tokenizer = pipe.model.text_tokenizer
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            found.append(TextPart(ids=tuple(tokenizer.encode(part))))
        else:
            picture = part if isinstance(part, Image.Image) else open_picture(part)
            found.append(ImagePart(codes_RC=pipe.encode(picture), role="read"))
    if not found or isinstance(found[0], ImagePart) or not any(part.strip() for part in parts if isinstance(part, str)):
        raise PromptError("there must be a text to begin with; say something")
    return [TextPart(ids=(tokenizer.bos_id, *found[0].ids)), *found[1:]]
