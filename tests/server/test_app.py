import base64
import io

import httpx2
import openai
import pytest
from openai import OpenAI
from PIL import Image

from mars.server import examples
from tests.server.conftest import Running, Start


def test_the_model_is_listed_and_others_are_not_found(client: OpenAI) -> None:
    (one,) = client.models.list()
    assert (one.id, one.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == one
    for ask in (
        lambda: client.models.retrieve("gpt/4"),
        lambda: client.images.generate(prompt="x", model="dall-e-3"),
        lambda: client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_every_refusal_has_the_shape_of_openai(started: Running) -> None:
    path, edits = (f"{started.url}/v1/images/{name}" for name in ("generations", "edits"))
    json, form = ({"Content-Type": kind} for kind in ("application/json", "multipart/form-data"))
    for answer, status, code in (
        (httpx2.get(f"{started.url}/v1/nothing"), 404, "not_found"),
        (httpx2.get(path), 405, "method_not_allowed"),
        (httpx2.post(path, content=b"{", headers=json), 400, "invalid_json"),
        (httpx2.post(path, content=b'{"prompt": "x"}'), 400, "invalid_request"),
        (httpx2.post(path, content=b"[" * 100_000, headers=json), 400, None),
        (httpx2.post(path, content=b'{"n": ' + b"9" * 5000 + b"}", headers=json), 400, None),
        (httpx2.post(path, content=b"\xff\xfe", headers=json), 400, None),
        (httpx2.post(path, json=[1]), 400, None),
        (httpx2.post(edits, content=b"x", headers=form), 400, None),
        (httpx2.post(edits, files={"image": b"x"}, data={"n": "many"}), 400, "invalid_value"),
        (httpx2.post(edits, data={"image": "x"}), 400, None),
        (httpx2.post(edits, files={"image": b"x", "other": b"y"}), 400, "unknown_parameter"),
    ):
        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert code in (None, error["code"])


def test_health_readiness_and_figures(started: Running, client: OpenAI) -> None:
    client.images.generate(prompt="x")
    assert httpx2.get(f"{started.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{started.url}/ready").json() == {"status": "ready"}
    text = httpx2.get(f"{started.url}/metrics").text
    assert 'mars_requests_total{path="/v1/images/generations",status="200"}' in text
    assert "mars_rows 0.0" in text
    assert 'path="other"' in text or "/nothing" not in text


def test_examples_of_the_document_can_be_sent(started: Running) -> None:
    document = httpx2.get(f"{started.url}/openapi.json").json()
    assert set(document["paths"]) >= {
        "/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/chat/completions", "/v1/models",
    }  # fmt: skip
    for methods in document["paths"].values():
        for method in methods.values():
            assert method["summary"]
            assert "422" not in method["responses"]
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert list(form) == ["multipart/form-data"]
    for path, table in (("images/generations", examples.GENERATION), ("chat/completions", examples.CHAT)):
        shown = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert shown == table
        for one in table.values():
            answer = httpx2.post(f"{started.url}/v1/{path}", json=one["value"], timeout=60)
            assert answer.status_code == 200, answer.text


def test_moderation_looks_at_prompts_and_pictures(start: Start) -> None:
    seen: list[tuple[str, bool]] = []

    def look(prompt: str, image: Image.Image | None) -> str | None:
        seen.append((prompt, image is not None))
        return "bad words" if prompt == "bad" else "bad picture" if prompt == "worse" and image is not None else None

    def failing(prompt: str, image: Image.Image | None) -> str | None:
        raise ZeroDivisionError

    with start(moderation=look) as found, found.client() as client:
        for prompt, reason in (("bad", "bad words"), ("worse", "bad picture")):
            with pytest.raises(openai.BadRequestError, match=f"refused by the server's moderation: {reason}") as caught:
                client.images.generate(prompt=prompt)
            assert caught.value.code == "moderation_blocked"
        with pytest.raises(openai.APIError, match="bad picture"):
            list(client.images.generate(prompt="worse", stream=True, partial_images=1))
        answer = client.images.generate(prompt="good")
        assert answer.data is not None
        Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).load()
    worse = [("worse", False), ("worse", True)]
    assert seen == [("bad", False), *worse, *worse, ("good", False), ("good", True)]
    with (
        start(moderation=failing) as found,
        found.client() as client,
        pytest.raises(openai.InternalServerError, match="the server failed; its log says why"),
    ):
        client.images.generate(prompt="x")
