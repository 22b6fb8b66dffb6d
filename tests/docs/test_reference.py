import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.reference import ELSEWHERE, command_line, http_page, site_links
from mars import cli
from mars.pipeline import MarsPipeline
from mars.server.app import make_app
from mars.server.settings import Settings
from mars.server.worker import Worker

ROOT = Path(__file__).parents[2]
LOADED = {"audio", "embed", "iframe", "img", "script", "source", "video"}


def test_links_between_files_of_the_repository_become_links_between_pages() -> None:
    page = (
        "[a](docs/serve.md) [b](../ARCHITECTURE.md) [c](NOTICE) [d](serve.md#in-production) [e](https://a.b/docs/c.md)"
    )
    assert site_links(page) == (
        "[a](serve.md) [b](architecture.md) [c](notice.md) [d](serve.md#in-production) [e](https://a.b/docs/c.md)"
    )
    assert site_links("![x](docs/mars-mini.png)") == "![x](mars-mini.png)"
    assert all((ROOT / source).is_file() for source in ELSEWHERE)


def test_the_command_line_has_every_command_and_option() -> None:
    page = command_line()
    for command in cli.app.registered_commands:
        assert f"## `mars {command.name or command.callback.__name__}`" in page  # type: ignore[union-attr]
    assert "## `mars data`" in page
    assert "### `mars data ingest`" in page
    assert "--lora-scale" in page


def test_the_page_of_an_openapi_document_has_every_address_field_and_answer(tiny_model: Path) -> None:
    worker = Worker(MarsPipeline.from_pretrained(tiny_model), queue=1)
    document = make_app(worker, Settings()).openapi()
    worker.close()
    worker.join()
    page = http_page(document)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            section = page.split(f"## {method.upper()} {path}\n", 1)[1].split("\n## ", 1)[0]
            assert all(f"| {code} |" in section for code in operation["responses"])
    for name, schema in document["components"]["schemas"].items():
        if "Validation" not in name:  # of an answer that is never sent
            assert all(f"| `{field}` |" in page for field in schema["properties"]), name
    anchors = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) == anchors


class _Loaded(HTMLParser):
    """Addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in LOADED or (tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload")):
            self.found += [value for name, value in attributes if name in ("src", "href") and value]


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text("utf-8"))
        assert [address for address in loaded.found if re.match(r"(https?:)?//", address)] == [], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text("utf-8")), style
