import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

from mars.errors import RequestError
from mars.server.serve import bind


@contextmanager
def process(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mars serve` on a free port, and its address."""
    code = "from mars.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--model", str(model), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                told = json.loads(line) if line.startswith("{") else {}
                if told.get("event") == "serving":
                    break
            yield running, f"http://127.0.0.1:{told['port']}"
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_was_accepted_is_done(tiny_model: Path, ending: signal.Signals) -> None:
    with process(tiny_model) as (running, url):
        answers = []
        body = {"prompt": "a", "n": 10, "candidates": 64, "seed": 1}

        def ask(stream: bool) -> None:
            answers.append(httpx2.post(f"{url}/v1/images/generations", json=body | {"stream": stream}, timeout=300))

        asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for one in asking:
            one.start()
        while "mars_queue 20.0" not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.01)
        running.send_signal(ending)
        for one in asking:
            one.join()
        assert running.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200, 200]
    texts = sorted((answer.text for answer in answers), key=lambda text: text.startswith("event"))
    assert len(json.loads(texts[0])["data"]) == 10
    assert texts[1].count("event: image_generation.completed") == 10
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


@pytest.mark.slow
def test_the_command_answers_with_its_settings(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key\n", "utf-8")
    with process(tiny_model, "--api-keys", str(tmp_path / "keys"), "--max-n", "1") as (running, url):
        with OpenAI(base_url=f"{url}/v1", api_key="key") as client:
            assert client.images.generate(prompt="a").data
        assert httpx2.post(f"{url}/v1/images/generations", json={"prompt": "a"}).status_code == 401
        running.terminate()
        assert running.wait(60) == 0


def test_an_address_that_cannot_be_had_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"127.0.0.1:{port} cannot be listened on .*choose another"):
            bind("127.0.0.1", port)
    with pytest.raises(RequestError, match="choose another host or port"):
        bind("no host", 8000)
