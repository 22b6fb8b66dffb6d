"""Sends a server requests that nobody should send, and looks at what is left of it.

    python -m benchmarks.serve_fuzz [--requests 10000] [--seed 0] [--threads 8] [--model FOLDER] [--out FILE.json]

No answer may be of the 500s, nothing may be logged as a failure, the server must live, draw the picture that it drew
before, hold nothing in its queue, and give memory back: the least that it held in the last quarter of the requests is
compared with the least in the second. Before all, it is made to remember as many texts as it ever will.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hostile_requests import Hostile, hostile
from benchmarks.server_process import PROBE, Server, idle, lines, server

SECONDS = 300.0
"""For one answer."""
SLOPE = 2000.0
"""Bytes a request by which a server may seem to grow: rooms that the allocator keeps, not a leak."""

REST = 2.0
"""Seconds before memory is read, in which a server that has nothing to do gives back what it can."""
WARM = 4000
"""Requests after which memory is judged: before, it warms up (rooms of the allocator)."""
LONG = [f"{number} " + "word " * 480 for number in range(20)]
"""Texts, of which the shipped model's server remembers more bytes than it has room for."""


@dataclass
class Found:
    """What came of it."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind: status, `closed` (hung up on, without an answer) or `unread`."""
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes, after equal numbers of requests."""


def send(port: int, request: Hostile) -> str:
    """A status, `closed`, `unread` or `silent`: no answer within five minutes."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        try:
            for part in request.parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)
        except OSError:  # the server hung up first; it may have said why
            pass
        if request.ending == "gone":
            return "unread"
        with suppress(OSError):
            if request.ending == "half" or request.kind in ("garbage", "headers", "paths"):
                connection.shutdown(socket.SHUT_WR)  # half a request is one whose rest never comes
        return _status(connection)


def _status(connection: socket.socket) -> str:
    """The status, once the whole answer is read."""
    head = b""
    try:
        while part := connection.recv(65536):
            head = (head + part)[:64]
    except TimeoutError:
        return "silent"
    except OSError:
        pass
    return head.split(b" ", 2)[1].decode() if head.startswith(b"HTTP/1.1 ") else "closed"


def fuzz(port: int, numbers: range, *, seed: int, threads: int, found: Found) -> None:
    """Sends the requests of some numbers."""

    def one(number: int) -> tuple[int, Hostile, str]:
        request = hostile(number, seed=seed)
        return number, request, send(port, request)

    with ThreadPoolExecutor(threads) as pool:
        for number, request, status in pool.map(one, numbers):
            found.statuses.setdefault(request.kind, Counter())[status] += 1
            if status.startswith("5") or status == "silent":
                start = b"".join(part for part in request.parts if isinstance(part, bytes))[:200]
                found.failures.append(f"request {number} ({request.kind}): {status} for {start!r}")


def run(found: Found, running: Server, *, requests: int, seed: int, threads: int, steps: int = 40) -> None:
    """The whole of it, on a server of one's own."""
    for text in LONG:
        running.ask("/v1/images/generations", {**PROBE, "prompt": text})
    wanted = running.draw()
    step = max(1, requests // steps)
    for begin in range(0, requests, step):
        fuzz(running.port, range(begin, min(requests, begin + step)), seed=seed, threads=threads, found=found)
        if not running.alive:
            found.failures.append(f"the server ended after request {begin} to {begin + step}")
            return
        if not idle(running.port):
            found.failures.append(f"the queue is not empty after request {begin + step}")
        if running.draw() != wanted:
            found.failures.append(f"another picture after request {begin + step}")
        time.sleep(REST)
        found.memory.append(running.memory)
        print(f"{begin + step:6} requests, {found.memory[-1] / 1e6:.0f} MB", file=sys.stderr)  # noqa: T201
    if (code := running.end()) != 0:
        found.failures.append(f"the exit code must be 0, got {code}")


def growth(memory: list[int], *, requests: int) -> float:
    """Bytes a request: how much lower than its lowest in the last quarter the lowest in the second quarter was."""
    quarter = len(memory) // 4
    return (min(memory[-quarter:]) - min(memory[quarter : 2 * quarter])) / (requests / 2)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--model", help="default: the one that is shipped")
    parser.add_argument("--out", type=Path, help="a JSON file with the figures")
    asked = parser.parse_args(arguments)
    found, began = Found(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with server(log, *(["--model", asked.model] if asked.model else [])) as running:
            steps = max(1, min(40, asked.requests // 100))
            run(found, running, requests=asked.requests, seed=asked.seed, threads=asked.threads, steps=steps)
        found.failures += [json.dumps(line)[:3000] for line in lines(log) if line["level"] == "error"]
    grown = growth(found.memory, requests=asked.requests) if len(found.memory) > 3 else 0.0
    if grown > SLOPE and asked.requests >= WARM:
        found.failures.append(f"memory grows by {grown:.0f} bytes a request")
    total = sum(found.statuses.values(), Counter())
    result: dict[str, Any] = {
        "requests": asked.requests, "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(sorted(total.items())),
        "kinds": {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.statuses.items())},
        "memory_mb": {"first": found.memory[0] / 1e6, "last": found.memory[-1] / 1e6, "most": max(found.memory) / 1e6}
        if found.memory else {},
        "bytes_a_request": round(grown, 1), "failures": found.failures,
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)  # noqa: T201
    if asked.out is not None:
        asked.out.write_text(text + "\n", "utf-8")
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
