"""What the page does: draw, upscale, edit, caption, write, and read from a picture how it was drawn.

Each is an asynchronous generator of what is shown and how it goes. Pictures come and go as data URLs, and nothing is
kept between two calls.
"""

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image

from mars.errors import ImageError, RequestError
from mars.generation.sampling import Sampling
from mars.picture import GeneratedImage
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn, Preview
from mars.pipeline.editing import edit_order
from mars.pipeline.orders import DEFAULT_SAMPLING, Order, draw_order, upscale_order
from mars.pipeline.writing import HalfDrawn, Painted, Said, captioning, document, reply
from mars.pipeline.writing import Words as Text
from mars.server.page.action import NOTHING, Action, PageError, Shown, Status
from mars.server.page.words import LANGUAGES, Words
from mars.server.pictures import data_url, encode, from_data_url, read, read_page, read_with_mask
from mars.server.service import Service

PREVIEWS = 6
"""Of each picture."""
PREVIEW_QUALITY = 85
CAPTION_TOKENS, TEXT_TOKENS, JOINT_TOKENS = 48, 256, 128
MOST = 2**31 - 1
SIDES = ("left", "above", "right", "below")

Steps = Callable[..., AsyncGenerator[Shown]]


def acting(name: str) -> Callable[[Steps], Steps]:
    """Makes steps, which are handed an Action, into a handler that has one of its own."""

    def wrap(steps: Steps) -> Steps:
        async def run(self: "Handlers", *given: Any) -> AsyncGenerator[Shown]:
            action = Action(service=self.service, say=self.say, name=name)
            async with aclosing(action.show(steps(self, action, *given))) as running:
                async for shown in running:
                    yield shown

        run.__name__ = name
        return run

    return wrap


@dataclass(frozen=True)
class Handlers:
    """Those of one language's page."""

    service: Service
    say: Words

    @acting("draw")
    async def draw(
        self, action: Action, prompt: object, n: object, size: object, *how: object
    ) -> AsyncGenerator[Shown]:
        """Pictures for a prompt; `how` is as `HOW` of the layout says: negative prompt, seed, sampling."""
        text = self._text(prompt, param="prompt")
        if not text.strip():
            raise PageError(self.say("no_prompt"))
        sizes = {f"{width}x{height}": (width, height) for width, height in self.service.pipe.sizes}
        width, height = sizes.get(str(size), self.service.pipe.sizes[0])
        options = self._options(n, *how)
        begin = partial(draw_order, prompt=text, width=width, height=height, **options)
        async for shown in self._show_pictures(action, begin, prompt=text, n=options["n"]):
            yield shown

    @acting("upscale")
    async def upscale(self, action: Action, picture: object) -> AsyncGenerator[Shown]:
        """A picture drawn again, larger; its prompt and seed stand in it, if it is ours."""
        small = await self._read(picture)
        about = small.info if isinstance(small.info.get("prompt"), str) else {}
        prompt = self._text(about.get("prompt", ""), param="prompt")
        begin = partial(upscale_order, picture=small, prompt=prompt, seed=self._seed(about.get("seed", "")))
        async for shown in self._show_pictures(action, begin, prompt=prompt, n=1):
            yield shown

    @acting("edit")
    async def edit(
        self, action: Action, painted: object, way: object, prompt: object, sides: object, margin: object,
        strength: object, n: object, *how: object,
    ) -> AsyncGenerator[Shown]:  # fmt: skip
        """A picture drawn anew in part: where a mask is, around it, or here and there."""
        given = painted if isinstance(painted, dict) else {}
        text, options = self._text(prompt, param="prompt"), self._options(n, *how)
        content = self._content(given.get("src"))
        size, limits = self.service.pipe.sizes[0], self.service.settings.limits
        if way == "paint":
            if not given.get("mask"):
                raise PageError(self.say("no_mask"))
            mask = from_data_url(str(given["mask"]), param="mask")
            page, hole = await read_with_mask(content, mask, size=size, limits=limits)
            begin = partial(edit_order, picture=page, prompt=text, mask=hole, **options)
        else:
            page = await read_page(content, size=size, limits=limits, param="image")
            if way == "vary":
                begin = partial(edit_order, picture=page, prompt=text, vary=_number(strength), **options)
            else:
                margins = self._margins(sides, margin, size=size)
                begin = partial(edit_order, picture=page, prompt=text, margins=margins, **options)
        async for shown in self._show_pictures(action, begin, prompt=text, n=options["n"]):
            yield shown

    @acting("describe")
    async def describe(self, action: Action, picture: object) -> AsyncGenerator[Shown]:
        """What a picture shows, in both languages, one after the other."""
        page = await self._page(picture)
        self.service.note(action.request, prompt="")
        await self.service.moderate("")
        captions = dict.fromkeys(LANGUAGES, "")
        for language in LANGUAGES:
            begin = partial(
                captioning, picture=page, language=language, max_tokens=self._tokens(CAPTION_TOKENS),
                sampling=Sampling(temperature=0),
            )  # fmt: skip
            async for news in action.hear(begin):
                if isinstance(news, Text):
                    self.service.metrics.text_tokens.inc(news.tokens)
                    captions[language] = (captions[language] + news.text).lstrip()
                yield dict(captions), action.busy("reading")
        yield dict(captions), action.done()

    @acting("write")
    async def write(
        self, action: Action, story: object, text: object, picture: object, way: object, most: object
    ) -> AsyncGenerator[Shown]:
        """The conversation, gone on with: text by the base LLM, or text and pictures by all of the model."""
        said = self._text(text, param="text")
        if not said.strip():
            raise PageError(self.say("no_text"))
        turns = [*self._story(story), {"who": "user", "text": said}]
        if picture:
            turns.append({"who": "user", "src": str(picture)})
        prompt = "\n".join(turn["text"] for turn in turns if "text" in turn)
        self.service.check_text(prompt, param="the conversation")
        self.service.note(action.request, prompt=prompt)
        await self.service.moderate(prompt)
        begin = self._answering(turns) if way == "text" else await self._going_on(turns, most=most)
        yield turns, action.busy("writing")
        half = False  # whether the last turn is a picture half-way
        async for news in action.hear(begin):
            if isinstance(news, HalfDrawn | Painted):
                turn = {"who": "assistant", **await self._shown(prompt, news.image)}
                turns = [*(turns[:-1] if half else turns), turn]
                half = isinstance(news, HalfDrawn)
            elif isinstance(news, Text):
                self.service.metrics.text_tokens.inc(news.tokens)
                if turns[-1]["who"] == "assistant" and "text" in turns[-1]:
                    turns = [*turns[:-1], {"who": "assistant", "text": turns[-1]["text"] + news.text}]
                else:
                    turns = [*turns, {"who": "assistant", "text": news.text}]
            yield turns, action.busy("writing")
        yield turns, action.done()

    async def recall(self, picture: object) -> tuple[Any, ...]:
        """How one of our pictures was drawn: prompt, negative prompt, seed, sampling, and how it went."""
        try:
            about = (await self._read(picture)).info
            settings = json.loads(str(about["settings"]))
            found = next((settings[name] for name in ("edit", "joint") if name in settings), settings)
            how = {name: found[name] for name in asdict(DEFAULT_SAMPLING) if name in found}
            sampling = Sampling(**how)
            prompt, negative = self._text(about["prompt"], param="prompt"), str(found.get("negative_prompt", ""))
            seed = str(self._seed(str(about["seed"])))
        except (LookupError, ValueError, TypeError, AttributeError, RequestError):
            return (NOTHING,) * 8 + (self._error("no_settings"),)
        except (ImageError, PageError):
            return (NOTHING,) * 8 + (self._error("bad_picture"),)
        done: Status = {"kind": "done", "text": self.say("recalled")}
        numbers = sampling.guidance, sampling.temperature, sampling.top_k, sampling.top_p, sampling.candidates
        return prompt, negative, seed, *numbers, done

    async def _show_pictures(
        self, action: Action, begin: Callable[[MarsPipeline], Order], *, prompt: str, n: int
    ) -> AsyncGenerator[Shown]:
        self.service.check_count(n, param="n")
        self.service.note(action.request, prompt=prompt, n=n)
        await self.service.moderate(prompt)
        pictures: list[dict[str, str] | None] = [None] * n
        yield {"pictures": pictures}, action.busy("drawing")
        async for news in action.hear(begin, size=n, previews=PREVIEWS):
            if isinstance(news, Preview):
                shown = await self._shown(prompt, news.image)
                pictures = [*pictures[: news.picture], shown, *pictures[news.picture + 1 :]]
            elif isinstance(news, Drawn):
                self.service.metrics.pictures.inc(n)
                pictures = [await self._shown(prompt, image) for image in news.generated.images]
                break
            yield {"pictures": pictures}, action.busy("drawing")
        yield {"pictures": pictures}, action.done()

    async def _shown(self, prompt: str, image: Image.Image) -> dict[str, str]:
        """A picture for the browser: a drawn one with all that it says, or a preview."""
        await self.service.moderate(prompt, image)
        if isinstance(image, GeneratedImage):
            about = image.info
            return {"src": await data_url(image), "prompt": about["prompt"], "seed": about["seed"], "state": "done"}
        self.service.metrics.previews.inc()
        jpeg = await encode(image, "jpeg", quality=PREVIEW_QUALITY)
        return {"src": f"data:image/jpeg;base64,{jpeg}", "state": "preview"}

    def _answering(self, turns: list[dict[str, str]]) -> Callable[[MarsPipeline], Iterator[Text]]:
        texts = [(turn["who"], turn["text"]) for turn in turns if "text" in turn]

        def begin(pipe: MarsPipeline) -> Iterator[Text]:
            return reply(
                pipe.model, texts[-1][1], system="You are a helpful assistant.", before=texts[:-1],
                max_tokens=self._tokens(TEXT_TOKENS),
            )  # fmt: skip

        return begin

    async def _going_on(self, turns: list[dict[str, str]], *, most: object) -> Callable[[MarsPipeline], Any]:
        parts: list[Said] = [turn["text"] if "text" in turn else await self._page(turn["src"]) for turn in turns]
        images = int(_number(most))
        self.service.check_count(images, param="n")
        return partial(
            document, parts=parts, max_tokens=self._tokens(JOINT_TOKENS), max_images=images, previews=True
        )  # fmt: skip

    def _story(self, story: object) -> list[dict[str, str]]:
        """What was said so far, as the browser tells it."""
        turns = [] if story is None else story
        if not isinstance(turns, list):
            raise PageError(self.say("bad_request"))
        for turn in turns:
            if not (
                isinstance(turn, dict)
                and turn.get("who") in ("user", "assistant")
                and isinstance(turn.get("text", turn.get("src")), str)
            ):
                raise PageError(self.say("bad_request"))
        found = [turn for turn in turns if turn.get("state") != "preview"]
        self.service.check_count(sum("src" in turn for turn in found), param="story", what="pictures")
        return found

    def _options(self, n: object, *how: object) -> dict[str, Any]:
        """What all orders take: `n`, seed, negative prompt and sampling."""
        if len(how) != 7:
            raise PageError(self.say("bad_request"))
        negative, seed, guidance, temperature, top_k, top_p, candidates = how
        sampling = Sampling(
            guidance=_number(guidance), temperature=_number(temperature), top_k=int(_number(top_k)),
            top_p=_number(top_p), candidates=int(_number(candidates)),
        )  # fmt: skip
        return {
            "n": int(_number(n)), "seed": self._seed(seed), "sampling": sampling,
            "negative_prompt": self._text(negative, param="negative_prompt"),
        }  # fmt: skip

    def _seed(self, text: object) -> int | None:
        given = str(text or "").strip()
        if not given:
            return None
        if not (given.isascii() and given.isdecimal() and int(given[:20]) < 2**63 and len(given) < 20):
            raise PageError(self.say("bad_seed"))
        return int(given)

    def _text(self, text: object, *, param: str) -> str:
        given = "" if text is None else text
        if not isinstance(given, str) or "\0" in given:
            raise PageError(self.say("bad_request"))
        self.service.check_text(given, param=param)
        return given

    def _margins(self, sides: object, margin: object, *, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Pixels on each side; a share is one of the picture's width or height."""
        chosen = sides if isinstance(sides, list) else []
        if not any(side in SIDES for side in chosen):
            raise PageError(self.say("no_side"))
        share = min(max(_number(margin), 0), 1)
        width, height = (max(1, round(share * length)) for length in size)
        lengths = (width, height, width, height)
        left, above, right, below = (
            length if side in chosen else 0 for side, length in zip(SIDES, lengths, strict=True)
        )
        return left, above, right, below

    def _content(self, picture: object) -> bytes:
        if not picture or not isinstance(picture, str):
            raise PageError(self.say("no_picture"))
        return from_data_url(picture, param="image")

    async def _page(self, picture: object) -> Image.Image:
        """A picture on a page of the model's size."""
        return await read_page(
            self._content(picture), size=self.service.pipe.sizes[0], limits=self.service.settings.limits, param="image"
        )

    async def _read(self, picture: object) -> Image.Image:
        return await read(self._content(picture), limits=self.service.settings.limits, param="image")

    def _tokens(self, number: int) -> int:
        return min(number, self.service.settings.limits.tokens)

    def _error(self, name: str) -> Status:
        return {"kind": "error", "text": self.say(name)}


def _number(given: object) -> float:
    """A number of the browser's; raises RequestError for what is none, or far too large."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= MOST:
        raise RequestError(f"a setting must be a number of at most {MOST:,}, got {given!r:.40}")
    return float(given)
