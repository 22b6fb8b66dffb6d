"""The page in a real browser: headless Chromium, driven by playwright."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mars.picture import open_picture
from mars.pipeline import MarsPipeline
from mars.server.settings import Keys, Settings
from tests.server.conftest import Running, running
from tests.server.test_hearing import busy, figure, until

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 240_000
"""Milliseconds: the machine may be busy."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's packages chromium and fonts-wqy-microhei)"),
]


class Visit:
    """Somebody who looks at the page."""

    def __init__(self, page: Any, port: int) -> None:
        self.page = page
        self.port = port
        self.trouble: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(WAIT)
        page.on("console", lambda one: self.trouble.extend([one.text] * (one.type in ("error", "warning"))))
        page.on("pageerror", lambda one: self.trouble.append(str(one)))
        page.on("request", lambda one: self.hosts.add(one.url.split("/")[2]) if "://" in one.url else None)
        page.on("response", lambda one: self.trouble.extend([f"{one.status} {one.url}"] * (one.status >= 400)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector(".mars-go")

    def seen(self, selector: str) -> Any:
        """The first of these that can be seen."""
        return self.page.locator(f"{selector} >> visible=true").first

    def go(self) -> str:
        """Presses the tab's button and waits for the end, of which it returns the line."""
        self.forget()
        self.seen(".mars-go").click()
        return self.end()

    def forget(self) -> None:
        """Lets what was done before be forgotten, so that `end` waits for what comes."""
        self.page.evaluate("document.querySelectorAll('.mars-status').forEach(one => { one.dataset.kind = ''; })")

    def end(self) -> str:
        """Waits for the end of what was begun, and returns its line."""
        line = self.page.locator(".mars-status:is([data-kind=done], [data-kind=error]) >> visible=true").first
        line.wait_for()
        return str(line.inner_text())

    def count(self, number: int) -> None:
        """Says how many pictures to draw."""
        self.seen("input[type=number]").fill(str(number))

    def pictures(self) -> list[Image.Image]:
        """Those that are shown."""
        sources = self.page.eval_on_selector_all(
            ".mars-cell img", "all => all.filter(one => one.offsetParent).map(one => one.src)"
        )
        return [Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))) for one in sources]

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@contextmanager
def visiting(found: Running, **options: Any) -> Iterator[Visit]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        visit = Visit(browser.new_context(**options).new_page(), found.port)
        yield visit
        assert visit.trouble == []
        assert visit.hosts == {f"127.0.0.1:{found.port}"}
        browser.close()


@pytest.fixture(scope="module")
def shipped() -> Iterator[Running]:
    with running(MarsPipeline.from_pretrained(), Settings(page=True)) as found:
        yield found


@pytest.mark.parametrize(
    "screen", [{"width": 1280, "height": 860}, {"width": 390, "height": 844}], ids=["desktop", "phone"]
)
def test_somebody_draws_edits_describes_and_writes_in_chinese(shipped: Running, screen: dict[str, int]) -> None:
    with visiting(shipped, viewport=screen, locale="zh-CN") as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.lang").startswith("zh")
        page.fill("#prompt textarea", "红苹果")
        visit.count(2)
        visit.seen(".mars-go").click()
        page.wait_for_selector(".mars-cell.preview")
        assert visit.end().startswith("完成")
        assert [one.info["prompt"] for one in visit.pictures()] == ["红苹果"] * 2
        assert visit.seen("[data-do=upscale]").is_disabled()
        assert visit.seen("#drawn-why").inner_text() == "mars-mini 没有经过放大训练。"
        assert visit.fits()

        visit.seen("[data-do=edit]").click()
        box = visit.seen(".mars-stage canvas").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9, steps=4)
        page.mouse.up()
        assert page.input_value("#edit-prompt textarea") == "红苹果"
        visit.count(1)
        assert visit.go().startswith("完成")
        (edited,) = visit.pictures()
        assert '"edit"' in edited.info["settings"]
        assert visit.fits()

        visit.seen("[data-do=describe]").click()
        assert visit.go().startswith("完成")
        assert all(one.strip() for one in page.locator(".mars-caption p").all_inner_texts())
        assert visit.fits()

        page.locator("[role=tab] >> visible=true").nth(3).click()
        visit.seen("textarea").fill("一只猫：")
        assert visit.go().startswith("完成")
        page.wait_for_selector(".mars-turn.assistant")
        assert visit.fits()

        page.locator(".mars-thumb").last.click()
        page.fill("#prompt textarea", "", force=True)
        visit.seen(".mars-shelf [data-do=recall]").click()
        page.wait_for_function("() => document.querySelector('#prompt textarea').value === '红苹果'")
        assert visit.fits()


def test_everything_can_be_done_without_a_mouse(paged: Running, tmp_path: Path) -> None:
    with visiting(paged, viewport={"width": 1280, "height": 860}, locale="en-US") as visit:
        page, keyboard = visit.page, visit.page.keyboard
        page.focus("#prompt textarea")
        keyboard.type("a cat")
        keyboard.press("Control+Enter")
        assert visit.end().startswith("Done")
        reached = []
        for _ in range(60):
            keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 90)"))
        parts = "mars-chip", "mars-go", "mars-cell", 'data-do="edit"', "mars-thumb", "mars-language", "mars-theme"
        for part in parts:
            assert any(part in one for one in reached), part
        page.focus("[data-do=edit]")
        keyboard.press("Enter")
        visit.forget()
        visit.seen(".mars-stage canvas").focus()
        for key in ("ArrowRight", "ArrowDown", "]", " "):
            keyboard.press(key)
        keyboard.press("Control+Enter")
        assert visit.end().startswith("Done")

        with page.expect_download() as saved:
            visit.seen("[data-do=save]").click()
        file = tmp_path / "saved.png"
        saved.value.save_as(file)
        assert '"edit"' in open_picture(file).info["settings"]
        page.reload()
        page.wait_for_selector(".mars-thumb")
        page.locator(".mars-shelf input[type=file]").set_input_files(file)
        page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'a cat'")
        assert visit.seen(".mars-status").inner_text() == "The settings of this picture are back."


def test_a_dropped_picture_of_ours_gives_its_settings_and_another_says_that_it_has_none(paged: Running) -> None:
    drop = """async (url) => {
        const all = new DataTransfer();
        all.items.add(new File([await (await fetch(url)).blob()], "x.png", { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: all, bubbles: true, cancelable: true }));
    }"""
    drawn = paged.worker.pipe("two dogs", seed=5).images[0]
    with visiting(paged, locale="en-US", bypass_csp=True) as visit:
        for image, line in ((drawn, "are back."), (Image.new("RGB", (64, 64)), "does not say how it was drawn.")):
            file = io.BytesIO()
            image.save(file, "PNG")
            visit.page.evaluate(drop, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
            visit.page.get_by_text(line).wait_for()
            assert visit.page.input_value("#prompt textarea") == "two dogs"


def test_what_was_shown_stays_when_something_goes_wrong(paged: Running) -> None:
    with visiting(paged, locale="en-US") as visit:
        visit.page.fill("#prompt textarea", "a cat")
        assert visit.go().startswith("Done")
        shown = [one.tobytes() for one in visit.pictures()]
        visit.page.fill("#prompt textarea", "  ")
        assert visit.go() == "Say what to draw."
        assert [one.tobytes() for one in visit.pictures()] == shown


def test_what_was_asked_for_can_be_stopped(paged: Running) -> None:
    with busy(paged.worker), visiting(paged, locale="en-US") as visit:
        visit.page.fill("#prompt textarea", "a cat")
        visit.seen(".mars-go").click()
        visit.page.get_by_text("Waiting").wait_for()
        visit.page.keyboard.press("Escape")
        visit.page.get_by_text("Stopped.").wait_for()
    until(lambda: paged.worker.held == 0)
    drawn = figure(paged, 'mars_requests_total{path="page/draw",status="499"}')
    assert drawn >= 1


def test_a_picture_is_upscaled_on_the_page(tiny_upscaler: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_upscaler)
    with running(pipe, Settings(page=True)) as found, visiting(found, locale="en-US") as visit:
        visit.page.fill("#prompt textarea", "a cat")
        visit.count(2)
        assert visit.go().startswith("Done")
        seeds = [one.info["seed"] for one in visit.pictures()]
        visit.page.locator(".mars-cell").nth(1).click()
        visit.forget()
        visit.seen("[data-do=upscale]").click()
        assert visit.end().startswith("Done")
        (large,) = visit.pictures()
        assert large.size == (96, 64)
        assert large.info["seed"] == seeds[1]


def test_a_key_opens_the_page_in_a_browser(tiny_model: Path) -> None:
    pipe, settings = MarsPipeline.from_pretrained(tiny_model), Settings(page=True, keys=Keys(["s3cret"]))
    with running(pipe, settings) as found, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(locale="zh-CN", color_scheme="dark").new_page()
        page.set_default_timeout(WAIT)
        page.goto(found.url)
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("服务器不认识这个密钥。").wait_for()
        page.keyboard.type("s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector(".mars-go")
        page.fill("#prompt textarea", "x")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".mars-status[data-kind=done]")
        browser.close()
