import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mars.pipeline import MarsPipeline
from mars.server.settings import Limits
from tests.server.conftest import Lines, Running, Start, running
from tests.server.page.conftest import HOW, ask, is_unchanged, read, url, whole
from tests.server.test_hearing import busy, figure, until

PAGE = Image.new("RGB", (48, 32), "teal")


def last(outputs: list[Any]) -> tuple[Any, dict[str, str]]:
    shown, status = whole(outputs)[-1]
    return shown, status


def test_pictures_are_drawn_as_the_api_draws_them_after_previews(paged: Running, log: Lines) -> None:
    steps = whole(ask(paged, "draw", ["a cat", 2, "48x32", *HOW]))
    kinds = [[one and one["state"] for one in shown["pictures"]] for shown, _ in steps]
    assert kinds[0] == [None, None]
    assert ["preview", "preview"] in kinds
    assert kinds[-1] == ["done", "done"]
    assert {status["kind"] for _, status in steps[:-2]} == {"busy"}
    assert steps[-1][1]["kind"] == "done"
    pictures = steps[-1][0]["pictures"]
    assert [(one["prompt"], one["seed"]) for one in pictures] == [("a cat", "1"), ("a cat", "2")]
    with paged.client() as client:
        how = {"guidance_scale": 2, "temperature": 0.6, "candidates": 1}
        (one,) = client.images.generate(prompt="a cat", extra_body={"seed": 2, **how}).data or []
    assert pictures[1]["src"].partition(",")[2] == one.b64_json
    line = next(line for line in log.lines if line.get("path") == "page/draw")
    assert (line["status"], line["n"], line["method"]) == (200, 2, "PAGE")
    assert "prompt" not in line
    assert figure(paged, 'mars_requests_total{path="page/draw",status="200"}') >= 1


def test_the_settings_of_a_picture_come_back(paged: Running) -> None:
    how = ["dogs", "7", 3.5, 0.5, 12, 0.9, 2]
    shown, _ = last(ask(paged, "draw", ["a cat", 1, None, *how]))
    drawn = shown["pictures"][0]["src"]
    assert ask(paged, "recall", [drawn])[-1][:8] == ["a cat", *how]
    given = {"src": drawn, "mask": None}
    varied, _ = last(ask(paged, "edit", [given, "vary", "a dog", [], 0.5, 0.5, 1, *how]))
    *fields, status = ask(paged, "recall", [varied["pictures"][0]["src"]])[-1]
    assert fields == ["a dog", *how]
    assert status["kind"] == "done"


@pytest.mark.parametrize("settings", ["[1]", "{", '{"guidance": "x"}', '{"top_p": 7}', '{"edit": 3}'])
def test_a_picture_that_does_not_say_how_it_was_drawn_changes_nothing(paged: Running, settings: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for name, value in {"settings": settings, "prompt": "x", "seed": "1"}.items():
        text.add_itxt(name, value)
    for picture, line in (
        (url(PAGE), "does not say how"), (None, "cannot be read"), ("data:image/png;base64,AAAA", "cannot be read"),
        (_with(text), "does not say how"),
    ):  # fmt: skip
        *fields, status = ask(paged, "recall", [picture])[-1]
        assert all(map(is_unchanged, fields))
        assert status["kind"] == "error"
        assert line in status["text"]


def _with(text: Any) -> str:
    import base64
    import io

    file = io.BytesIO()
    PAGE.save(file, "PNG", pnginfo=text)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_mask_is_drawn_anew_and_the_rest_keeps_its_pixels(paged: Running) -> None:
    mask = Image.new("L", PAGE.size)
    mask.paste(255, (32, 16, 48, 32))
    given = {"src": url(PAGE), "mask": url(mask)}
    shown, status = last(ask(paged, "edit", [given, "paint", "a cat", [], 0.5, 0.3, 1, *HOW]))
    assert status["kind"] == "done"
    drawn = read(shown["pictures"][0])
    assert drawn.getpixel((2, 2)) == PAGE.getpixel((2, 2))
    assert drawn.crop((34, 18, 48, 32)).tobytes() != PAGE.crop((34, 18, 48, 32)).tobytes()
    extended, _ = last(ask(paged, "edit", [given, "extend", "", ["right", "below"], 0.5, 0.3, 2, *HOW]))
    info = json.loads(read(extended["pictures"][1]).info["settings"])["edit"]
    assert info["margins"] == [0, 0, 24, 16]


@pytest.mark.parametrize(
    ("given", "way", "sides", "line"),
    [
        (None, "paint", [], "Choose a picture first."),
        ({"src": 3}, "vary", [], "Choose a picture first."),
        ({"src": url(PAGE), "mask": None}, "paint", [], "Paint over what is to be drawn anew."),
        ({"src": url(PAGE)}, "extend", [], "Choose a side to extend."),
        ({"src": "http://127.0.0.1/x.png"}, "vary", [], "the server fetches nothing"),
    ],
)
def test_an_edit_that_lacks_something_says_what(
    paged: Running, given: Any, way: str, sides: list[str], line: str
) -> None:
    shown, status = last(ask(paged, "edit", [given, way, "", sides, 0.5, 0.3, 1, *HOW]))
    assert is_unchanged(shown)
    assert status["kind"] == "error"
    assert line in status["text"]


def test_a_picture_is_described_in_both_languages(paged: Running) -> None:
    steps = whole(ask(paged, "describe", [url(PAGE)]))
    captions, status = steps[-1]
    assert captions.keys() == {"en", "zh"}
    assert status["kind"] == "done"
    pipe = paged.worker.pipe
    for language in ("en", "zh"):
        assert captions[language].strip() == pipe.caption(PAGE, language=language)


def test_text_and_pictures_take_turns(paged: Running) -> None:
    shown, status = last(ask(paged, "write", [None, "he", url(PAGE), "both", 2]))
    assert status["kind"] == "done"
    assert shown[0] == {"who": "user", "text": "he"}
    assert shown[1]["src"] == url(PAGE)
    answer = shown[2:]
    assert all(turn["who"] == "assistant" for turn in answer)
    assert all(turn.get("state", "done") == "done" for turn in answer)
    more, status = last(ask(paged, "write", [shown[:2], "and", None, "text", 1]))
    assert status["kind"] == "done", status
    assert more[:3] == [*shown[:2], {"who": "user", "text": "and"}]
    assert [set(turn) for turn in more[3:]] in ([{"who", "text"}], [])


def test_a_picture_is_upscaled_by_a_model_that_can(tiny_upscaler: Path, paged: Running) -> None:
    from mars.server.settings import Settings

    with running(MarsPipeline.from_pretrained(tiny_upscaler), Settings(page=True)) as found:
        shown, _ = last(ask(found, "draw", ["a cat", 1, None, *HOW]))
        larger, status = last(ask(found, "upscale", [shown["pictures"][0]["src"]]))
        image = read(larger["pictures"][0])
        assert status["kind"] == "done"
        assert image.size == (96, 64)
        assert (image.info["prompt"], image.info["seed"]) == ("a cat", "1")
    _, status = last(ask(paged, "upscale", [url(PAGE)]))
    assert "was not trained to upscale" in status["text"]


@pytest.mark.parametrize(
    ("prompt", "n", "how", "english", "chinese"),
    [
        ("  ", 1, HOW, "Say what to draw.", "请先写下想画的内容。"),
        ("x", 1, ["", "-3", *HOW[2:]], "The seed must be", "种子须为"),
        ("x", 1, ["", "9" * 19, *HOW[2:]], "The seed must be", "种子须为"),
        ("x", 1, [*HOW[:4], None, 1.0, 1], "a setting must be a number", "无法完成"),
        ("word " * 600, 1, HOW, "at most 512 tokens", "at most 512 tokens"),
        ("bad", 1, HOW, "The server does not draw this: it is bad", "服务器拒绝了这一请求：it is bad"),
        ("broken", 1, HOW, "The server failed; its log says why", "服务器出错"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(
    strict: Running, prompt: str, n: int, how: list[Any], english: str, chinese: str
) -> None:
    for language, line in (("en", english), ("zh", chinese)):
        shown, status = last(ask(strict, "draw", [prompt, n, None, *how], language=language))
        assert status["kind"] == "error"
        assert line in status["text"]
        assert "\n" not in status["text"]
        assert is_unchanged(shown) or shown["pictures"] == [None] * n
    assert strict.worker.held == 0


@pytest.fixture(scope="module")
def strict(tiny_model: Path) -> Any:
    from mars.server.settings import Settings

    def look(prompt: str, image: Image.Image | None) -> str | None:
        if prompt == "broken":
            raise ZeroDivisionError
        return "it is bad" if prompt == "bad" else None

    settings = Settings(page=True, moderation=look, limits=Limits(images=3, queue=4))
    with running(MarsPipeline.from_pretrained(tiny_model), settings) as found:
        yield found


def test_a_full_queue_is_one_line(start: Start) -> None:
    with start(page=True, limits=Limits(queue=2, images=2)) as found:
        with busy(found.worker, size=2):
            _, status = last(ask(found, "draw", ["x", 1, None, *HOW]))
        assert status["kind"] == "error"
        assert status["text"].startswith("Too many are drawing just now; try again in")


def test_a_page_that_is_closed_frees_its_rows(paged: Running, log: Lines) -> None:
    import threading

    import httpx2

    long = [*HOW[:6], 64]
    with httpx2.Client(base_url=f"{paged.url}/en", timeout=60) as client:
        functions = {one["api_name"]: one["id"] for one in client.get("/config").json()["dependencies"]}
        asked = {"data": ["a", 8, None, *long], "fn_index": functions["draw"], "session_hash": "gone"}
        client.post("/gradio_api/queue/join", json=asked).raise_for_status()
        with client.stream("GET", "/gradio_api/queue/data?session_hash=gone") as stream:
            lines = stream.iter_lines()
            until(lambda: paged.worker.rows > 0 or not next(lines, "end"))
    until(lambda: paged.worker.held == 0)
    assert log.wait(499)["path"] == "page/draw"
    assert threading.active_count() < 100
