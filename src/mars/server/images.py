"""/v1/images: generations, edits and variations."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Form, Request
from PIL import Image
from starlette.responses import Response

from mars.picture import GeneratedImage
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn, Preview
from mars.pipeline.editing import edit_order
from mars.pipeline.orders import Generated, Order, draw_order
from mars.server import examples
from mars.server.errors import ApiError, json_response
from mars.server.hearing import EventStream, Hearing
from mars.server.pictures import Format, encode, read_page, read_with_mask
from mars.server.schemas import DrawFields, EditForm, GenerationRequest, StreamFields, VariationForm
from mars.server.service import Service, event, sampling_of
from mars.server.worker import Begun


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is asked for, checked."""

    event: str
    """What its events are called."""
    prompt: str
    n: int
    size: tuple[int, int]
    seed: int | None
    kind: Format
    quality: int
    url: bool
    """Whether pictures are told as data URLs."""
    stream: bool
    previews: int


def routes(service: Service) -> APIRouter:
    """The three endpoints."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations", responses=examples.IMAGES)
    async def generations(
        asked: Annotated[GenerationRequest, Body(openapi_examples=examples.GENERATION)], request: Request
    ) -> Response:
        """Draw pictures for a prompt."""
        what = _check(service, asked, prompt=asked.prompt, event="image_generation")
        if not asked.prompt.strip():
            raise ApiError(400, "prompt must not be empty; say what to draw", param="prompt")
        width, height = what.size
        begin = partial(
            draw_order, prompt=asked.prompt, n=what.n, seed=what.seed, width=width, height=height,
            negative_prompt=asked.negative_prompt or "", sampling=sampling_of(asked),
        )  # fmt: skip
        return await _draw(service, request, what, begin, user=asked.safety_identifier or asked.user)

    @router.post("/edits", responses=examples.IMAGES)
    async def edits(form: Annotated[EditForm, Form(media_type="multipart/form-data")], request: Request) -> Response:
        """Draw a part of a picture anew; the rest keeps its pixels."""
        what = _check(service, form, prompt=form.prompt, event="image_edit")
        given = [*([] if form.image is None else [form.image]), *(form.images or [])]
        if len(given) != 1:
            raise ApiError(400, f"there must be one image, got {len(given)}", param="image")
        page, hole = await read_with_mask(
            await given[0].read(), None if form.mask is None else await form.mask.read(), size=_first_size(service),
            limits=service.settings.limits,
        )  # fmt: skip
        begin = _editing(form, what, page, prompt=form.prompt, mask=hole)
        return await _draw(service, request, what, begin, user=form.safety_identifier or form.user)

    @router.post("/variations", responses=examples.IMAGES)
    async def variations(
        form: Annotated[VariationForm, Form(media_type="multipart/form-data")], request: Request
    ) -> Response:
        """Draw a share of a picture anew, in places that the seed chooses."""
        what = _check(service, form, prompt=form.prompt, event="image_variation")
        page = await read_page(
            await form.image.read(), size=_first_size(service), limits=service.settings.limits, param="image"
        )
        begin = _editing(form, what, page, prompt=form.prompt, vary=form.strength)
        return await _draw(service, request, what, begin, user=form.safety_identifier or form.user)

    return router


def _editing(
    form: DrawFields, what: Drawing, page: Image.Image, *, prompt: str, mask: Image.Image | None = None,
    vary: float | None = None,
) -> Callable[[MarsPipeline], Order]:  # fmt: skip
    return partial(
        edit_order, picture=page, prompt=prompt, mask=mask, vary=vary, n=what.n, seed=what.seed,
        negative_prompt=form.negative_prompt or "", sampling=sampling_of(form),
    )  # fmt: skip


def _first_size(service: Service) -> tuple[int, int]:
    return service.pipe.sizes[0]


def _check(service: Service, asked: DrawFields, *, prompt: str, event: str) -> Drawing:
    """Checks what need not wait for the worker."""
    service.check_model(asked.model)
    n = asked.n or 1
    service.check_count(n, param="n")
    service.check_text(prompt, param="prompt")
    service.check_text(asked.negative_prompt or "", param="negative_prompt")
    kind: Format = "png"
    quality, stream, previews = 100, False, 0
    if isinstance(asked, StreamFields):
        kind, stream, previews = asked.output_format or "png", bool(asked.stream), asked.partial_images or 0
        if asked.output_compression is not None:
            quality = asked.output_compression
            if kind == "png":
                raise ApiError(400, "output_compression is for jpeg and webp; PNG has none", param="output_compression")
        if previews and not stream:
            raise ApiError(400, "partial_images needs stream", param="partial_images")
    if stream and asked.response_format == "url":
        raise ApiError(400, "a stream has b64_json only, got url", param="response_format")
    sizes = service.pipe.sizes if event == "image_generation" else [_first_size(service)]
    return Drawing(
        event=event, prompt=prompt, n=n, size=_find_size(asked.size, sizes=sizes), seed=asked.seed, kind=kind,
        quality=quality, url=asked.response_format == "url", stream=stream, previews=previews,
    )  # fmt: skip


def _find_size(text: str | None, *, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    named = {f"{width}x{height}": (width, height) for width, height in sizes}
    if text in (None, "auto"):
        return sizes[0]
    if text not in named:
        raise ApiError(400, f"size must be auto or one of {', '.join(named)}, got {text!r:.40}", param="size")
    return named[text]


async def _draw(
    service: Service, request: Request, what: Drawing, begin: Callable[[MarsPipeline], Order], *, user: str | None
) -> Response:
    service.note(request, prompt=what.prompt, n=what.n, user=user)
    await service.moderate(what.prompt)
    hearing = service.ask(request, begin, size=what.n, previews=what.previews)
    streams = False
    try:
        begun = await hearing.next()
        assert isinstance(begun, Begun)
        assert begun.order is not None
        usage = _usage(service, what, begun.order)
        if what.stream:
            streams = True
            return EventStream(_events(service, what, hearing, usage), hearing)
        drawn = await hearing.next()
        assert isinstance(drawn, Drawn)
        service.metrics.pictures.inc(what.n)
        return json_response(await _answer(service, what, drawn.generated, usage))
    finally:
        if not streams:
            hearing.close()


async def _answer(service: Service, what: Drawing, generated: Generated, usage: dict[str, Any]) -> dict[str, Any]:
    data = []
    for image, seed in zip(generated.images, generated.seeds, strict=True):
        found = await _file(service, what, image)
        told = {"url": f"data:image/{what.kind};base64,{found}"} if what.url else {"b64_json": found}
        data.append({**told, "seed": seed})
    return {"created": int(time.time()), "data": data, **_about(what), "usage": usage}


async def _events(service: Service, what: Drawing, hearing: Hearing, usage: dict[str, Any]) -> AsyncIterator[bytes]:
    """The official events; `image_index` says which picture, where there are several."""
    told: dict[str, Any]
    try:
        while True:
            news = await hearing.next()
            if isinstance(news, Preview):
                service.metrics.previews.inc()
                told = {"partial_image_index": news.number, "image_index": news.picture}
                yield await _event(service, what, "partial_image", news.image, told)
            elif isinstance(news, Drawn):
                break
        service.metrics.pictures.inc(what.n)
        drawn = zip(news.generated.images, news.generated.seeds, strict=True)
        for index, (image, seed) in enumerate(drawn):
            told = {"usage": usage, "image_index": index, "seed": seed}
            yield await _event(service, what, "completed", image, told)
    except ApiError as error:
        hearing.note(error)
        yield event(error.body, name="error")


async def _event(service: Service, what: Drawing, kind: str, image: Image.Image, more: dict[str, Any]) -> bytes:
    name = f"{what.event}.{kind}"
    found = await _file(service, what, image)
    return event({"type": name, "b64_json": found, "created_at": int(time.time()), **_about(what), **more}, name=name)


async def _file(service: Service, what: Drawing, image: Image.Image | GeneratedImage) -> str:
    await service.moderate(what.prompt, image)
    return await encode(image, what.kind, quality=what.quality)


def _about(what: Drawing) -> dict[str, str]:
    return {
        "background": "opaque", "output_format": what.kind, "quality": "auto",
        "size": f"{what.size[0]}x{what.size[1]}",
    }  # fmt: skip


def _usage(service: Service, what: Drawing, order: Order) -> dict[str, Any]:
    """Text ids that are read, and codes of the pictures that are returned."""
    text, codes = service.count(what.prompt), sum(one.places for one in order.requests)
    read = 0 if what.event == "image_generation" else order.requests[0].places
    return {
        "input_tokens": text + read,
        "input_tokens_details": {"text_tokens": text, "image_tokens": read},
        "output_tokens": codes,
        "total_tokens": text + read + codes,
    }
