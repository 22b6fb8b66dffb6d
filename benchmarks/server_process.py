"""A `mars serve` of one's own: its address, its memory, one picture by it, and its end."""

import base64
import hashlib
import http.client
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import linear_regression
from typing import Any

from PIL import Image

COMMAND = [sys.executable, "-c", "from mars.cli import main; main()", "serve", "--port", "0"]
PROBE = {"prompt": "red apple", "seed": 7, "candidates": 1}
"""What is drawn to see whether drawing still works."""


class Server:
    """A server that answers."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def memory(self) -> int:
        """Bytes that its process holds, as `held` counts them."""
        return held(self.process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def ask(self, path: str, body: Any = None, *, timeout: float = 300.0) -> tuple[int, bytes]:
        """A status and a body; with a body, JSON is posted."""
        return ask(self.port, path, body, timeout=timeout)

    def draw(self, **fields: Any) -> str:
        """The digest of a picture's pixels."""
        status, answer = self.ask("/v1/images/generations", {**PROBE, **fields})
        if status != 200:
            raise RuntimeError(f"a picture must be drawn, got {status}: {answer[:300]!r}")
        return digest(answer)

    def end(self, ending: signal.Signals = signal.SIGTERM, *, timeout: float = 600.0) -> int:
        """Asks it to end; its exit code."""
        self.process.send_signal(ending)
        return self.process.wait(timeout)


def replicas(pid: int) -> list[int]:
    """Processes of Ray Serve that draw, among all that came of a process."""
    parents: dict[int, int] = {}
    for found in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(found.parent.name)] = int(found.read_text("ascii", "replace").rpartition(")")[2].split()[1])
    return [one for one in parents if pid in _ancestors(one, parents) and _named(one, b"ray::ServeReplica")]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found


def _named(pid: int, name: bytes) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name)
    return False


def held(pid: int) -> int:
    """Bytes of memory that a process holds itself; mapped files (weights, libraries), which come in page by page when
    they are first used, do not count.
    """
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def ask(port: int, path: str, body: Any = None, *, timeout: float = 300.0) -> tuple[int, bytes]:
    """A status and a body of a server of this machine; with a body, JSON is posted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def digest(answer: bytes) -> str:
    """Of the pixels of the first picture in an answer."""
    return pixels(base64.b64decode(json.loads(answer)["data"][0]["b64_json"]))


def pixels(picture: bytes) -> str:
    """The digest of a file's pixels."""
    with Image.open(io.BytesIO(picture)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def idle(port: int, *, seconds: float = 60.0) -> bool:
    """Whether a server's queue is empty before long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if b"\nmars_queue 0.0" in ask(port, "/metrics")[1]:
            return True
        time.sleep(0.05)
    return False


@contextmanager
def server(log: Path, *options: str) -> Iterator[Server]:
    """`mars serve` with these options on a free port; what it logs goes to a file.

    Raises:
        RuntimeError: if it does not come to serve.
    """
    with log.open("w") as file, subprocess.Popen([*COMMAND, *options], stderr=file, text=True) as process:
        try:
            while not (serving := [line for line in lines(log) if line.get("event") == "serving"]):
                if process.poll() is not None:
                    raise RuntimeError("mars serve did not start: " + log.read_text("utf-8")[-2000:])
                time.sleep(0.05)
            yield Server(process, serving[0]["port"])
        finally:
            process.kill()


def lines(log: Path) -> list[dict[str, Any]]:
    """What a server logged."""
    whole = log.read_text("utf-8").rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole if line.startswith("{")]


def slope(values: Sequence[float]) -> float:
    """Of the straight line nearest to values at 0, 1, 2...: by how much they grow from one to the next."""
    return linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0
