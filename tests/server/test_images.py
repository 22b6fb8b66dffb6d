import base64
import io
import json
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import ExifTags, Image

from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from tests.server.conftest import Running


def opened(b64: str | None) -> Image.Image:
    assert b64 is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def blocks() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 32), Image.Resampling.NEAREST)


def near(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1)


def test_a_picture_is_what_the_pipeline_draws(client: OpenAI, pipe: MarsPipeline) -> None:
    answer = client.images.generate(
        model="tiny", prompt="a red apple", n=2, size="48x32", user="me",
        extra_body={
            "seed": 3, "negative_prompt": "blue", "guidance_scale": 3.5, "temperature": 0.7, "top_k": 40, "top_p": 0.9,
            "candidates": 2, "guidance_stop": 0.4,
        },
    )  # fmt: skip
    sampling = Sampling(guidance=3.5, temperature=0.7, top_k=40, top_p=0.9, candidates=2, guidance_stop=0.4)
    wanted = pipe("a red apple", n=2, seed=3, negative_prompt="blue", sampling=sampling)
    assert answer.data is not None
    assert len(answer.data) == 2
    for found, image in zip(answer.data, wanted.images, strict=True):
        drawn = opened(found.b64_json)
        assert near(drawn, image)
        assert drawn.info == image.info
    assert (answer.size, answer.output_format, answer.background) == ("48x32", "png", "opaque")
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_carry_how_they_were_drawn(client: OpenAI, kind: Any) -> None:
    sizes = []
    for quality in (100, 10):
        answer = client.images.generate(
            prompt="猫", output_format=kind, output_compression=quality, response_format="url", extra_body={"seed": 5}
        )
        assert answer.data is not None
        head, _, content = str(answer.data[0].url).partition(",")
        assert head == f"data:image/{kind};base64"
        image = opened(content)
        assert image.format == kind.upper()
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        about = json.loads(comment[8:])
        assert (about["prompt"], about["seed"]) == ("猫", "5")
        sizes.append(len(content))
    assert sizes[1] < sizes[0]


def test_a_stream_shows_previews_in_order_and_then_the_picture(client: OpenAI, pipe: MarsPipeline) -> None:
    wanted = pipe("a red apple", n=2, seed=1)
    events = list(
        client.images.generate(prompt="a red apple", n=2, stream=True, partial_images=3, extra_body={"seed": 1})
    )
    kinds = [(event.type, event.model_extra["image_index"]) for event in events if event.model_extra]
    assert kinds == [
        ("image_generation.partial_image", 0), ("image_generation.partial_image", 1),
        ("image_generation.completed", 0), ("image_generation.completed", 1),
    ]  # fmt: skip
    for event in events[:2]:
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == 0
        assert (np.asarray(opened(event.b64_json))[16:] == 255).all()
    for event, image in zip(events[2:], wanted.images, strict=True):
        assert event.type == "image_generation.completed"
        assert event.usage.output_tokens == 12
        assert near(opened(event.b64_json), image)
    assert [one.type for one in client.images.generate(prompt="x", stream=True)] == ["image_generation.completed"]


def test_an_edit_keeps_what_the_mask_does_not_show(client: OpenAI, pipe: MarsPipeline) -> None:
    picture, mask = blocks(), Image.new("RGBA", (48, 32), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 48, 32))
    cut = picture.convert("RGBA")
    cut.putalpha(mask.getchannel("A"))
    wanted = pipe.edit(picture, "red", mask=mask, seed=2).images[0]
    answer = client.images.edit(image=png(picture), mask=png(mask), prompt="red", extra_body={"seed": 2})
    assert answer.data is not None
    drawn = opened(answer.data[0].b64_json)
    assert near(drawn, wanted)
    assert "edit" in json.loads(drawn.info["settings"])
    assert near(drawn.crop((0, 0, 24, 32)), picture.crop((0, 0, 24, 32)))
    events = list(
        client.images.edit(image=[png(cut)], prompt="red", stream=True, partial_images=1, extra_body={"seed": 2})
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert near(opened(events[1].b64_json).crop((0, 0, 24, 32)), picture.crop((0, 0, 24, 32)))


def test_variations_differ_by_seed(client: OpenAI, pipe: MarsPipeline) -> None:
    picture = blocks()
    with pytest.deprecated_call():
        answer = client.images.create_variation(image=png(picture), n=2, extra_body={"seed": 4, "strength": 0.5})
    wanted = pipe.edit(picture, vary=0.5, n=2, seed=4)
    assert answer.data is not None
    for found, image in zip(answer.data, wanted.images, strict=True):
        assert near(opened(found.b64_json), image)


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "prompt must not be empty"),
    ({"prompt": "x" * 9000}, "prompt", "at most 8,000 characters, got 9,000"),
    ({"prompt": "x" * 1000}, None, "at most 512 tokens"),
    ({"prompt": "a\0b"}, "prompt", "pattern"),
    ({"prompt": "\ud800"}, "prompt", "prompt"),
    ({"prompt": 3}, "prompt", "string"),
    ({}, "prompt", "prompt must be given"),
    ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "x", "n": 11}, "n", "at most 10, got 11"),
    ({"prompt": "x", "n": True}, "n", "must not be true or false"),
    ({"prompt": "x", "size": "50x50"}, "size", "auto or one of 48x32"),
    ({"prompt": "x", "seed": 2**63}, "seed", "less than"),
    ({"prompt": "x", "seed": -1}, "seed", "greater"),
    ({"prompt": "x", "output_compression": 5}, "output_compression", "PNG has none"),
    ({"prompt": "x", "partial_images": 1}, "partial_images", "needs stream"),
    ({"prompt": "x", "partial_images": 4, "stream": True}, "partial_images", "less than"),
    ({"prompt": "x", "background": "transparent"}, "background", "opaque"),
    ({"prompt": "x", "candidates": 65}, None, "candidates must lie in 1..64"),
    ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
    ({"prompt": "x", "top_k": -1}, "top_k", "greater"),
    ({"prompt": "x", "temperature": 1e999}, "temperature", "finite"),
    ({"prompt": "x", "\ud800": 1}, None, "a JSON object"),
    ({"prompt": "x", "steps": 20}, "steps", "unknown parameter: steps"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_drawn_is_refused_in_one_line(
    started: Running, body: dict[str, Any], param: str | None, message: str
) -> None:
    content = json.dumps(body).encode()
    answer = httpx2.post(
        f"{started.url}/v1/images/generations", content=content, headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_pictures_that_cannot_be_edited_are_refused(client: OpenAI) -> None:
    whole = png(blocks())
    cases: list[tuple[Any, Any, str]] = [
        (b"no picture", None, "image is not a picture; give a PNG, JPEG or WebP file"),
        (whole[:200], None, "image is damaged or cut short"),
        (whole, None, "an edit needs a mask, or an image that is transparent"),
        (whole, png(Image.new("L", (48, 32))), "nothing is"),
        (whole, png(Image.new("L", (48, 48), 255)), "the mask must have the picture's size"),
        ([whole, whole], whole, "there must be one image, got 2"),
        (png(Image.new("1", (5000, 5000))), whole, "at most 16,000,000 pixels, got 5000x5000"),
    ]
    for image, mask, message in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(image=image, prompt="x", mask=openai.omit if mask is None else mask)
        assert message in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="image must be given"):
        client.post("/images/variations", body={"n": "1"}, cast_to=object)
