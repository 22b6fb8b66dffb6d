import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from PIL import Image

from mars.generation.engine import text_ids
from mars.pipeline import MarsPipeline
from mars.server.settings import Limits, Settings
from tests.server.conftest import Lines, Running, running


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def shown(image: Image.Image, text: str = "What is this?") -> list[Any]:
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url(image)}}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> Iterator[Running]:
    """A server whose model begins an image where the second id of what it would write after "red" stands."""
    pipe = MarsPipeline.from_pretrained(tiny_model)
    transformer = pipe.model.transformer
    with torch.no_grad():
        second = list(text_ids(transformer, pipe.prompt_ids("red"), max_tokens=2, end=()))[1]
        transformer.special_head.weight[0] = 1.2 * transformer.text_table[second]
    with running(pipe, Settings()) as found:
        yield found


def test_a_text_is_answered_by_the_base_llm(client: OpenAI, pipe: MarsPipeline) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    wanted = pipe.chat("hello", max_tokens=12)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == wanted.strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage


def test_what_was_said_before_counts(client: OpenAI) -> None:
    def said(*turns: tuple[str, str]) -> str | None:
        messages: list[Any] = [{"role": role, "content": text} for role, text in turns]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content

    last = ("user", "hello")
    alone = said(last)
    assert said(("system", "You are a helpful assistant."), last) == alone
    assert len({alone, said(("system", "Be brief."), last), said(("user", "a"), ("assistant", "b"), last)}) == 3


def test_a_picture_is_captioned(client: OpenAI, pipe: MarsPipeline) -> None:
    image = Image.new("RGB", (48, 32), "red")
    for text, language in (("What is this?", "en"), ("这是什么？", "zh")):
        answer = client.chat.completions.create(model="tiny", messages=shown(image, text))
        assert answer.choices[0].message.content == pipe.caption(image, language=language)


def test_text_and_pictures_come_in_turns(painter: Running) -> None:
    with painter.client() as client:
        body = {"modalities": ["text", "image"], "max_images": 1, "seed": 4}
        messages: list[Any] = [{"role": "user", "content": "red"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, extra_body=body)
        parts: Any = answer.choices[0].message.content
        assert [part["type"] for part in parts].count("image_url") == 1
        picture = next(part for part in parts if part["type"] == "image_url")["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as found:
            assert found.info["seed"] == "4"
        told: list[Any] = []
        for chunk in client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True, extra_body=body
        ):
            content: Any = chunk.choices[0].delta.content
            told += content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        texts = "".join(part["text"] for part in told if part["type"] == "text")
        assert texts == "".join(part["text"] for part in parts if part["type"] == "text")
        assert [part for part in told if part["type"] == "image_url"] == [
            part for part in parts if part["type"] == "image_url"
        ]


def test_a_streamed_chat_whose_picture_is_refused_says_so(painter: Running, log: Lines) -> None:
    def look(_: str, image: Image.Image | None) -> str | None:
        return None if image is None else "bad picture"

    body = {"modalities": ["text", "image"], "max_images": 1, "seed": 4}
    messages: list[Any] = [{"role": "user", "content": "red"}]
    with running(painter.worker.pipe, Settings(moderation=look)) as found, found.client() as client:
        with pytest.raises(openai.APIError, match="bad picture"):
            list(
                client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=12, stream=True, extra_body=body
                )
            )
        assert log.wait(400)["path"] == "/v1/chat/completions"


def test_only_pictures_that_are_seen_are_read_and_counted(client: OpenAI, pipe: MarsPipeline) -> None:
    unread = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
    many: Any = {"role": "user", "content": [{"type": "text", "text": "look"}, *([unread] * 11)]}
    turns: list[Any] = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "yes"}]
    last: Any = {"role": "user", "content": "hello"}
    answers = [
        client.chat.completions.create(model="tiny", messages=[*before, last], max_tokens=4)
        for before in (turns, [many, *turns[1:]])
    ]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage
    image = Image.new("RGB", (48, 32), "red")
    answer = client.chat.completions.create(model="tiny", messages=[many, *shown(image, "x")])
    assert answer.choices[0].message.content == pipe.caption(image, language="en")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(pipe.model.text_tokenizer.encode("look\nx")) + 6
    for extra in ({}, {"modalities": ["image", "text"]}):  # refused before one of them is looked at
        with pytest.raises(openai.BadRequestError, match="pictures in messages must be at most 10, got 11") as caught:
            client.chat.completions.create(model="tiny", messages=[many], extra_body=extra)
        assert caught.value.param == "messages"


def test_a_chat_paints_no_more_than_one_request_may(tiny_model: Path) -> None:
    """By the room that it asks for, which is more than the tiny model has where there are many pictures."""
    pipe = MarsPipeline.from_pretrained(tiny_model)
    messages: list[Any] = [{"role": "user", "content": "red"}]
    tokens = pipe.model.transformer.config.language.max_positions - len(pipe.prompt_ids("red")) - 8 - 8
    with running(pipe, Settings(limits=Limits(images=1))) as found, found.client() as client:
        body = {"modalities": ["text", "image"]}
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens, extra_body=body)
        with pytest.raises(openai.BadRequestError, match="max_images must be at most 1, got 2"):
            client.chat.completions.create(model="tiny", messages=messages, extra_body=body | {"max_images": 2})


def test_chats_that_cannot_be_are_refused(client: OpenAI) -> None:
    image = Image.new("RGB", (48, 32))
    whole, twice = shown(image)[0]["content"], shown(image)
    twice[0]["content"] = [*whole, *whole]

    def pointing(address: str) -> list[Any]:
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]

    cases: list[tuple[Any, dict[str, Any], str]] = [
        (pointing("http://example.org/a.png"), {}, "the server fetches nothing"),
        (pointing("data:image/png;base64,@"), {}, "valid base64"),
        (pointing("data:image/png;base64,aaaa"), {}, "not a picture"),
        ([{"role": "user", "content": " "}], {}, "the text must not be empty"),
        ([{"role": "assistant", "content": "x"}], {}, "the last message must be the user's"),
        ([], {}, "messages"),
        ([{"role": "user", "content": "x" * 9000}], {}, "at most 8,000 characters"),
        ([{"role": "user", "content": "x" * 500}], {}, "must be shorter than"),
        ([{"role": "user", "content": "x"}], {"max_tokens": 5000}, "max_tokens must be at most 1024"),
        (twice, {}, "one image to caption, got 2"),
        (shown(image, ""), {"extra_body": {"modalities": ["image", "text"]}}, "a text to begin with"),
        ([{"role": "user", "content": "x"}], {"n": 2}, "n: "),
        ([{"role": "user", "content": "x"}], {"seed": False}, "seed: Value error, must not be true or false"),
    ]  # fmt: skip
    for messages, options, message in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages, **options)
        assert message in str(caught.value)
