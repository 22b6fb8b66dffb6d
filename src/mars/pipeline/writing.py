"""Text out: what the base LLM answers, and documents in which text and pictures take turns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from mars.checkpoint import MarsModel
from mars.errors import PromptError, RequestError
from mars.generation.engine import text_ids
from mars.generation.joint import Drew, DrewRow, WriteRequest, Wrote, write
from mars.generation.sampling import Sampling
from mars.picture import GeneratedImage, open_picture
from mars.pipeline.checks import all_seeds
from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.sequence.interleaved import ImagePart, Part, TextPart
from mars.sequence.text import CAPTION_HINTS, TextTokenizer

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

Said = str | Path | Image.Image
"""A text, or a picture: its file or itself."""


@dataclass(frozen=True)
class Words:
    """Another piece of text."""

    text: str
    tokens: int
    """Ids that it was decoded from."""


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
    counted: int = 0
    """Ids of what was told."""

    def say(self, token: int) -> Iterator[Words]:
        """What can be told after another id."""
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids)
        if not whole.endswith("\ufffd"):
            yield from self._tell(whole)

    def rest(self) -> Iterator[Words]:
        """What waited in vain."""
        yield from self._tell(self.tokenizer.decode(self.ids))

    def _tell(self, whole: str) -> Iterator[Words]:
        if piece := whole[len(self.told) :]:
            yield Words(piece, tokens=len(self.ids) - self.counted)
            self.told, self.counted = whole, len(self.ids)


def reply(
    model: MarsModel,
    text: str,
    *,
    system: str | None,
    before: Sequence[tuple[str, str]] = (),
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Words]:
    """The base LLM's answer, piece by piece.

    Args:
        before: what was said so far, as (`user` or `assistant`, text).
        sampling: default takes the likeliest id.

    Raises:
        PromptError: if the text is empty.
        RequestError: if what was said leaves no room in the LLM's positions.
    """
    if not text.strip():
        raise PromptError("the text must not be empty; say something")
    tokenizer = model.text_tokenizer
    ids = tokenizer.apply_chat(text, system=system, before=before)
    end = (tokenizer.eos_id,)
    return _spoken(
        tokenizer,
        text_ids(model.transformer, ids, max_tokens=max_tokens, end=end, sampling=sampling, seed=seed),
    )


def captioning(
    pipe: "MarsPipeline", picture: Image.Image, *, language: str, max_tokens: int, sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Words]:  # fmt: skip
    """What a picture shows, piece by piece; arguments and errors are those of `MarsPipeline.caption`."""
    if language not in CAPTION_HINTS:
        raise RequestError(f"language must be one of {', '.join(CAPTION_HINTS)}, got {language!r}")
    tokenizer, transformer = pipe.model.text_tokenizer, pipe.model.transformer
    prompt = [transformer.vocabulary.image_end, *tokenizer.encode(CAPTION_HINTS[language])]
    ids = text_ids(
        transformer, prompt, max_tokens=max_tokens, end=(tokenizer.eos_id,), image=pipe.encode(picture),
        sampling=sampling, seed=seed,
    )  # fmt: skip
    return _spoken(tokenizer, ids)


def _spoken(tokenizer: TextTokenizer, ids: Iterable[int]) -> Iterator[Words]:
    speaker = Speaker(tokenizer)
    for token in ids:
        yield from speaker.say(token)
    yield from speaker.rest()


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
                yield from speaker.say(event.id)
            case DrewRow():
                if previews:
                    yield HalfDrawn(pipe.preview(event.codes, rows=request.grid[0]))
            case Drew():
                yield from speaker.rest()
                yield Painted(_painted(pipe, event.codes, seed=request.seed + images, settings=settings, said=speaker))
                images += 1
                speaker = Speaker(pipe.model.text_tokenizer)
    yield from speaker.rest()


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
