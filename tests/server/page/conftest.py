"""A server with its page, and what a browser does to call the page's functions."""

import base64
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx2
import pytest
from PIL import Image

from mars.pipeline import MarsPipeline
from mars.server.settings import Settings
from tests.server.conftest import Running, running

HOW: list[Any] = ["", "1", 2.0, 0.6, 0, 1.0, 1]
"""Negative prompt, seed, guidance, temperature, top-k, top-p, candidates."""


def is_unchanged(shown: Any) -> bool:
    """Whether what is shown stays as it is."""
    return isinstance(shown, dict) and shown.get("__type__") == "update" and "value" not in shown


class Served(Protocol):
    """A server, here or in another process."""

    url: str


@pytest.fixture(scope="session")
def paged(tiny_model: Path) -> Iterator[Running]:
    """A server of the tiny model with its page, which lets everybody in."""
    with running(MarsPipeline.from_pretrained(tiny_model), Settings(page=True)) as found:
        yield found


def ask(found: Served, name: str, data: list[Any], *, language: str = "en", cookie: str = "") -> list[Any]:
    """All outputs of one of the page's functions, as the browser sees them: whole ones, half-way and at the end."""
    with httpx2.Client(base_url=f"{found.url}/{language}", headers={"Cookie": cookie}, timeout=60) as client:
        functions = {one["api_name"]: one["id"] for one in client.get("/config").json()["dependencies"]}
        session = uuid.uuid4().hex
        asked = {"data": data, "fn_index": functions[name], "session_hash": session}
        client.post("/gradio_api/queue/join", json=asked).raise_for_status()
        outputs: list[Any] = []
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                news = json.loads(line.removeprefix("data: ")) if line else {}
                if news.get("msg") in ("process_generating", "process_completed"):
                    assert news["success"], news
                    outputs.append(news["output"]["data"])
                if news.get("msg") == "process_completed":
                    return outputs
    raise AssertionError(outputs)


def whole(outputs: list[Any]) -> list[list[Any]]:
    """The same, with changes to what was there before carried out."""
    found = [outputs[0]]
    for changes in outputs[1:]:
        now = json.loads(json.dumps(found[-1]))
        for index, change in enumerate(changes):
            is_change = isinstance(change, list) and all(isinstance(one, list) and len(one) == 3 for one in change)
            now[index] = _changed(now[index], change) if is_change else change
        found.append(now)
    return found


def _changed(value: Any, changes: list[list[Any]]) -> Any:
    for action, path, new in changes:
        if not path:
            value = new
            continue
        place = value
        for step in path[:-1]:
            place = place[step]
        if action == "delete":
            del place[path[-1]]
        elif action == "append":
            place[path[-1]] += new
        elif action == "add" and isinstance(place, list):
            place.insert(path[-1], new)
        else:
            place[path[-1]] = new
    return value


def read(picture: dict[str, str]) -> Image.Image:
    """A picture of the page."""
    head, _, content = picture["src"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == f"data:image/{(image.format or '').lower()};base64"
    return image


def url(image: Image.Image) -> str:
    """A picture as the browser sends it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
