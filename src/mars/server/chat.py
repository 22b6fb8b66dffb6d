"""/v1/chat/completions: text by the base LLM, captions of pictures, and text with pictures inside."""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from PIL import Image
from starlette.responses import Response

from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.pipeline.writing import Painted, Piece, Said, Words, captioning, document, reply
from mars.sequence.text import caption_language
from mars.server import examples
from mars.server.errors import ApiError, json_response
from mars.server.hearing import EventStream, Hearing
from mars.server.pictures import data_url, from_data_url, read_page
from mars.server.schemas import ChatRequest, ImageContent, Message, TextContent
from mars.server.service import Service, event, sampling_of
from mars.server.worker import Ended

MAX_TOKENS, CAPTION_TOKENS = 256, 48
"""Of an answer, and of a caption, where a request does not say."""
MAX_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is asked for, checked."""

    prompt: str
    """All text that was said."""
    pieces: Callable[[MarsPipeline], Iterator[Piece]]
    max_tokens: int
    joint: bool
    """Whether the answer is a list of texts and pictures."""
    read: int
    """Ids of all text, and codes of pictures that are seen."""


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(prefix="/v1/chat", tags=["chat"])

    @router.post("/completions", responses=examples.CHAT_ANSWER)
    async def completions(
        asked: Annotated[ChatRequest, Body(openapi_examples=examples.CHAT)], request: Request
    ) -> Response:
        """Answer, caption, or write and paint in turns."""
        chat = await _check(service, asked)
        service.note(request, prompt=chat.prompt, user=asked.safety_identifier or asked.user)
        await service.moderate(chat.prompt)
        hearing = service.ask(request, chat.pieces)
        streams = False
        try:
            await hearing.next()
            if asked.stream:
                streams = True
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                return EventStream(_chunks(service, chat, hearing, with_usage=usage), hearing)
            return json_response(await _answer(service, chat, hearing))
        finally:
            if not streams:
                hearing.close()

    return router


async def _check(service: Service, asked: ChatRequest) -> Chat:
    service.check_model(asked.model)
    limits = service.settings.limits
    images = asked.max_images or min(MAX_IMAGES, limits.images)
    service.check_count(images, param="max_images")
    wanted = asked.max_completion_tokens or asked.max_tokens
    if wanted is not None and wanted > limits.tokens:
        raise ApiError(400, f"max_tokens must be at most {limits.tokens}, got {wanted}", param="max_tokens")
    last = asked.messages[-1]
    if last.role != "user":
        raise ApiError(400, f"the last message must be the user's, got the {last.role}'s", param="messages")
    joint = "image" in asked.modalities
    seen = asked.messages if joint else [last]
    pictures = sum(isinstance(part, ImageContent) for one in seen for part in one.parts)
    service.check_count(pictures, param="messages", what="pictures in messages")
    texts = [[part.text for part in one.parts if isinstance(part, TextContent)] for one in asked.messages]
    service.check_text(*(text for some in texts for text in some), param="messages")
    prompt = "\n".join(text for some in texts for text in some)
    parts = [part for one in seen for part in await _parts(service, one)]
    codes = pictures * service.pipe.model.info.grids[0][0] * service.pipe.model.info.grids[0][1]
    writing = sampling_of(asked, default=Sampling(temperature=0))
    if joint:
        tokens = min(wanted or MAX_TOKENS // 2, limits.tokens)
        pieces = _joint(asked, parts, writing=writing, max_tokens=tokens, max_images=images)
    elif pictures:
        tokens = min(wanted or CAPTION_TOKENS, limits.tokens)
        pieces = _caption(asked, parts, writing=writing, max_tokens=tokens)
    else:
        tokens = min(wanted or MAX_TOKENS, limits.tokens)
        pieces = _text(asked, texts, writing=writing, max_tokens=tokens)
    return Chat(
        prompt=prompt, pieces=pieces, max_tokens=tokens, joint=joint, read=service.count(prompt) + codes
    )  # fmt: skip


async def _parts(service: Service, message: Message) -> list[str | Image.Image]:
    parts: list[str | Image.Image] = []
    for one in message.parts:
        if isinstance(one, TextContent):
            parts.append(one.text)
        else:
            content = from_data_url(one.image_url.url, param="messages")
            size = service.pipe.sizes[0]
            parts.append(await read_page(content, size=size, limits=service.settings.limits, param="the image"))
    return parts


def _text(
    asked: ChatRequest, texts: list[list[str]], *, writing: Sampling, max_tokens: int
) -> Callable[[MarsPipeline], Iterator[Piece]]:
    """The base LLM's answer; pictures of earlier turns are not seen."""
    turns = [(message.role, "\n".join(said)) for message, said in zip(asked.messages, texts, strict=True)]
    system = "\n".join(text for role, text in turns if role in ("system", "developer"))
    before = [(role, text) for role, text in turns[:-1] if role in ("user", "assistant")]

    def pieces(pipe: MarsPipeline) -> Iterator[Piece]:
        yield from reply(
            pipe.model, turns[-1][1], system=system or "You are a helpful assistant.", before=before,
            max_tokens=max_tokens, sampling=writing, seed=asked.seed or 0,
        )  # fmt: skip

    return pieces


def _caption(
    asked: ChatRequest, parts: list[str | Image.Image], *, writing: Sampling, max_tokens: int
) -> Callable[[MarsPipeline], Iterator[Piece]]:
    """What the picture of the last message shows; of what is said beside it only the language counts."""
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    if len(pictures) != 1:
        raise ApiError(400, f"a message must have one image to caption, got {len(pictures)}", param="messages")
    question = "".join(part for part in parts if isinstance(part, str))
    language = asked.language or caption_language(question)

    def pieces(pipe: MarsPipeline) -> Iterator[Piece]:
        yield from captioning(
            pipe, pictures[0], language=language, max_tokens=max_tokens, sampling=writing, seed=asked.seed or 0
        )

    return pieces


def _joint(
    asked: ChatRequest, parts: list[str | Image.Image], *, writing: Sampling, max_tokens: int, max_images: int
) -> Callable[[MarsPipeline], Iterator[Piece]]:
    """All messages are one document, with which the model goes on."""
    given: list[Said] = [part for part in parts if part != ""]
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed  # here: it may be done twice, alike
    drawing = DEFAULT_SAMPLING
    if asked.guidance_scale is not None:
        drawing = replace(drawing, guidance=asked.guidance_scale)

    def pieces(pipe: MarsPipeline) -> Iterator[Piece]:
        yield from document(
            pipe, given, max_tokens=max_tokens, max_images=max_images, seed=seed, writing=writing,
            drawing=drawing, previews=False,
        )  # fmt: skip

    return pieces


@dataclass
class Told:
    """What was told so far, in numbers."""

    tokens: int = 0
    images: int = 0

    def ended(self, chat: Chat) -> str:
        """Why it ended."""
        return "length" if self.tokens >= chat.max_tokens else "stop"

    def usage(self, service: Service, chat: Chat) -> dict[str, int]:
        """Ids and codes."""
        rows, columns = service.pipe.model.info.grids[0]
        written = self.tokens + self.images * rows * columns
        return {
            "prompt_tokens": chat.read, "completion_tokens": written, "total_tokens": chat.read + written
        }  # fmt: skip


async def _contents(service: Service, chat: Chat, hearing: Hearing, told: Told) -> AsyncIterator[str | dict[str, Any]]:
    """Texts, and pictures as parts of a message, as they come."""
    while not isinstance(news := await hearing.next(), Ended):
        if isinstance(news, Words):
            told.tokens += news.tokens
            service.metrics.text_tokens.inc(news.tokens)
            yield news.text
        elif isinstance(news, Painted):
            told.images += 1
            service.metrics.pictures.inc()
            await service.moderate(chat.prompt, news.image)
            yield {"type": "image_url", "image_url": {"url": await data_url(news.image)}}


async def _answer(service: Service, chat: Chat, hearing: Hearing) -> dict[str, Any]:
    told = Told()
    parts: list[dict[str, Any]] = []
    async for content in _contents(service, chat, hearing, told):
        if isinstance(content, dict):
            parts.append(content)
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += content
        else:
            parts.append({"type": "text", "text": content})
    text = "".join(part["text"] for part in parts if "text" in part).strip()
    message = {"role": "assistant", "content": parts if chat.joint else text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": told.ended(chat), "logprobs": None}
    return _head(service, "chat.completion") | {"choices": [choice], "usage": told.usage(service, chat)}


async def _chunks(service: Service, chat: Chat, hearing: Hearing, *, with_usage: bool) -> AsyncIterator[bytes]:
    """The official chunks; a picture is a list with one part, as vllm-omni tells it."""
    head, told = _head(service, "chat.completion.chunk"), Told()

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for content in _contents(service, chat, hearing, told):
            yield chunk({"content": content if isinstance(content, str) else [content]})
        yield chunk({}, told.ended(chat))
        if with_usage:
            yield event(head | {"choices": [], "usage": told.usage(service, chat)})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        hearing.note(error)
        yield event(error.body)


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name
    }  # fmt: skip
