import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

from tests.server.page.conftest import HOW, ask, whole
from tests.server.test_hearing import until
from tests.server.test_serve import process


class Address:
    """Of a server in another process."""

    def __init__(self, url: str) -> None:
        self.url = url


@pytest.mark.slow
def test_what_is_drawn_on_the_page_is_finished_when_a_signal_ends_the_server(tiny_model: Path) -> None:
    with process(tiny_model) as (running, url):
        found: list[list[object]] = []
        long = [*HOW[:6], 64]
        drawing = threading.Thread(target=lambda: found.extend(ask(Address(url), "draw", ["a", 8, None, *long])))
        drawing.start()
        until(lambda: "mars_queue 8.0" in httpx2.get(f"{url}/metrics").text)
        running.send_signal(signal.SIGTERM)
        drawing.join()
        assert running.wait(60) == 0
    shown, status = whole(found)[-1]
    assert status["kind"] == "done"
    assert [one["state"] for one in shown["pictures"]] == ["done"] * 8


def test_a_server_without_a_page_does_not_import_gradio() -> None:
    code = "import sys, mars.server.serve, mars.cli.serve; print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
