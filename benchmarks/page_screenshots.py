"""Pictures of the page for its documentation: docs/page.png and docs/page-phone.png.

    mars serve &
    python -m benchmarks.page_screenshots --url http://127.0.0.1:8000 --out docs

Needs Chromium and a font with Chinese characters (Debian: chromium, fonts-wqy-microhei), and playwright.
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

BEFORE = {"en": ("clown face", "rocket", "lemon", "grapes"), "zh": ("太阳", "火箭")}
PROMPTS = {"en": "sunflower", "zh": "企鹅"}
MOST_BYTES = 300_000


def draw(page: Page, prompt: str, *, n: int) -> None:
    """Draws on the page, and waits for the end."""
    page.fill("#prompt textarea", prompt)
    page.locator("input[type=number] >> visible=true").first.fill(str(n))
    page.evaluate("document.querySelector('.mars-status').dataset.kind = ''")
    page.locator(".mars-go >> visible=true").click()
    page.wait_for_selector(".mars-status[data-kind=done]")


def visit(browser: Browser, url: str, *, language: str, n: int, **options: Any) -> Image.Image:
    """What the page looks like after some pictures were drawn."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(600_000)
    page.goto(f"{url}/{language}/")
    page.wait_for_selector(".mars-go")
    for prompt in BEFORE[language]:
        draw(page, prompt, n=1)
    draw(page, PROMPTS[language], n=n)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)
    return Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")


def save(image: Image.Image, path: Path) -> None:
    """As PNG, with as many colours as fit into MOST_BYTES."""
    image.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Makes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    asked = parser.parse_args()
    desk = {"viewport": {"width": 1200, "height": 900}, "locale": "en-US"}
    phone = {"viewport": {"width": 390, "height": 844}, "locale": "zh-CN", "color_scheme": "dark", "is_mobile": True,
             "has_touch": True, "device_scale_factor": 1.5}  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=asked.chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        save(visit(browser, asked.url, language="en", n=4, **desk), asked.out / "page.png")
        save(visit(browser, asked.url, language="zh", n=1, **phone), asked.out / "page-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
