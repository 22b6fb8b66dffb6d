"""Many clients at once on a server: every accepted request is answered right, the rest are refused, nothing leaks.

    python -m benchmarks.serve_load [--seconds 300] [--clients 50] [--model FOLDER] [--out FILE.json] [-- OPTIONS]
    python -m benchmarks.serve_load --kill-every 20 -- --engine ray --replicas 2

A third of the requests hang up midway, a third are streams with previews, and every ten seconds a burst asks for more
than the queue holds. A picture must be the one that its prompt and seed give alone. OPTIONS are those of `mars serve`;
with Ray, a replica can be ended by `kill -9` again and again, and no request may be lost. At the end SIGTERM is sent
while all clients ask: what was accepted must be finished, and the exit code be 0.
"""

import argparse
import base64
import http.client
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.server_process import Server, digest, idle, lines, pixels, replicas, server, slope

PROMPTS = ("red apple", "红苹果", "slice of pizza", "a blue boat")
SEEDS = 6
BURST = 100
"""Requests at once, where the queue holds 64."""
BURST_EVERY = 10.0
SLOPE = 20_000.0
"""Bytes a second by which a server may seem to grow."""
WARM = 240
"""Seconds of a run whose second half is judged by that: in shorter ones the server still warms up."""

Case = tuple[str, int]
"""A prompt and a seed."""


@dataclass
class Outcome:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    """By status, `gone` (the client hung up) and `unanswered` (the server did)."""
    seconds: list[float] = field(default_factory=list)
    """Of answers with pictures."""
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes, every second."""


class Load:
    """Clients of one server, which know what they are to get."""

    def __init__(self, running: Server) -> None:
        self.running = running
        self.outcome = Outcome()
        self.wanted: dict[Case, str] = {
            (prompt, seed): running.draw(prompt=prompt, seed=seed) for prompt in PROMPTS for seed in range(SEEDS)
        }
        self.ending = threading.Event()
        """No more is asked for."""
        self.last_call = math.inf
        """What was asked for later than this need not be answered."""
        self.elapsed = 0.0

    def client(self, number: int) -> None:
        """Asks until the end."""
        dice = random.Random(number)
        while not self.ending.is_set():
            way = dice.choice(["whole", "stream", "gone"])
            status = self.ask(dice.choice(list(self.wanted)), way=way, patience=dice.random() * 0.5)
            if status in ("429", "unanswered"):
                time.sleep(0.2)

    def ask(self, case: Case, *, way: str = "whole", patience: float = 300.0) -> str:
        """One request; `patience` is after how many seconds one that is to hang up does."""
        body = {"prompt": case[0], "seed": case[1], "candidates": 1}
        body |= {"stream": True, "partial_images": 2} if way == "stream" else {}
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=300)
        status, found = "unanswered", ""
        try:
            head = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", "/v1/images/generations", json.dumps(body), head)
            if way == "gone":
                time.sleep(patience)
                status = "gone"
            else:
                answer = connection.getresponse()
                content = answer.read()
                status = str(answer.status)
                found = "" if status != "200" else _streamed(content) if way == "stream" else digest(content)
        except (OSError, http.client.HTTPException) as error:
            if began < self.last_call:
                self.outcome.failures.append(f"{case} ({way}): {type(error).__name__}: {error}")
        finally:
            connection.close()
        self._note(case, status, found, seconds=time.monotonic() - began)
        return status

    def _note(self, case: Case, status: str, found: str, *, seconds: float) -> None:
        self.outcome.counts[status] += 1
        if status == "200":
            self.outcome.seconds.append(seconds)
            if found != self.wanted[case]:
                self.outcome.failures.append(f"{case}: another picture than alone ({found:.80})")
        elif status not in ("429", "gone", "unanswered"):
            self.outcome.failures.append(f"{case}: {status}")

    def burst(self) -> None:
        """More than the queue holds, at once."""
        case = next(iter(self.wanted))
        asking = [threading.Thread(target=self.ask, args=(case,)) for _ in range(BURST)]
        for one in asking:
            one.start()
        for one in asking:
            one.join()

    @contextmanager
    def clients(self, count: int) -> Iterator[None]:
        """So many clients, while the context lasts; at its end all have their answers."""
        self.ending.clear()
        asking = [threading.Thread(target=self.client, args=(number,)) for number in range(count)]
        for one in asking:
            one.start()
        try:
            yield
        finally:
            self.ending.set()
            for one in asking:
                one.join()

    def kill_replicas(self, every: float) -> None:
        """Ends one after the other, until the end; the last one only once another is there."""
        dice = random.Random(0)
        while not self.ending.wait(every):
            found = replicas(self.running.process.pid)
            if len(found) > 1:
                os.kill(dice.choice(found), signal.SIGKILL)
                self.outcome.counts["killed"] += 1

    def run(self, *, seconds: float, clients: int, kill_every: float | None = None) -> None:
        """All of it, until the queue is empty again."""
        began = time.monotonic()
        until = began + seconds
        with self.clients(clients):
            due = time.monotonic() + min(BURST_EVERY, seconds / 3)
            bursts: list[threading.Thread] = []
            if kill_every:
                threading.Thread(target=self.kill_replicas, args=(kill_every,)).start()
            while time.monotonic() < until:
                time.sleep(1)
                self.outcome.memory.append(self.running.memory)
                if time.monotonic() > due:
                    bursts.append(threading.Thread(target=self.burst))
                    bursts[-1].start()
                    due = time.monotonic() + BURST_EVERY
            for one in bursts:
                one.join()
        self.elapsed = time.monotonic() - began
        if not idle(self.running.port):
            self.outcome.failures.append("the queue is not empty when nobody asks")

    def end(self, *, clients: int) -> None:
        """SIGTERM while everybody asks, who goes on asking."""
        before = self.outcome.counts["200"]
        with self.clients(clients):
            time.sleep(3)
            self.last_call = time.monotonic() - 1  # what was sent by then has been taken in, or refused
            code = self.running.end()
        if code != 0:
            self.outcome.failures.append(f"the exit code must be 0, got {code}")
        if self.outcome.counts["200"] == before:
            self.outcome.failures.append("nothing was finished after SIGTERM")


def _streamed(content: bytes) -> str:
    """The digest of the picture that a stream ends with, or what went wrong."""
    told = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: ")]
    kinds = [one.get("type", "error").rpartition(".")[2] for one in told]
    if kinds[-1:] != ["completed"] or set(kinds[:-1]) - {"partial_image"}:
        return f"a stream of {kinds}"
    return pixels(base64.b64decode(told[-1]["b64_json"]))


def check_log(load: Load, log: Path) -> None:
    """What the server says must be what the clients saw: no failure, and no answer that nobody got."""
    told = [line for line in lines(log) if line["event"] == "request" and line["path"] == "/v1/images/generations"]
    answered = sum(line["status"] == 200 for line in told) - len(load.wanted)
    load.outcome.failures += [json.dumps(line)[:3000] for line in lines(log) if line["level"] == "error"]
    heard = load.outcome.counts["200"] + load.outcome.counts["gone"]
    if not load.outcome.counts["200"] <= answered <= heard:
        load.outcome.failures.append(f"{answered} requests were answered, {load.outcome.counts['200']} came through")


def figures(load: Load, *, clients: int) -> dict[str, Any]:
    """As JSON."""
    outcome, memory = load.outcome, load.outcome.memory
    grown = slope(memory[len(memory) // 2 :])
    if grown > SLOPE and len(memory) >= WARM:
        outcome.failures.append(f"memory grows by {grown:.0f} bytes a second")
    cuts = quantiles(outcome.seconds, n=100) if len(outcome.seconds) > 1 else [0.0] * 99
    return {
        "clients": clients, "seconds": round(load.elapsed, 1), "counts": dict(sorted(outcome.counts.items())),
        "answer_seconds": {f"p{share}": round(cuts[share - 1], 3) for share in (50, 95, 99)},
        "pictures_a_second": round(len(outcome.seconds) / max(1, load.elapsed), 2),
        "memory_mb": {"first": memory[0] / 1e6, "last": memory[-1] / 1e6, "most": max(memory) / 1e6},
        "memory_bytes_a_second": round(grown), "failures": outcome.failures,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--model", help="default: the one that is shipped")
    parser.add_argument("--out", type=Path, help="a JSON file with the figures")
    parser.add_argument("--kill-every", type=float, help="seconds, with Ray")
    parser.add_argument("options", nargs="*", help="of mars serve, after --")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with server(log, *(["--model", asked.model] if asked.model else []), *asked.options) as running:
            load = Load(running)
            load.run(seconds=asked.seconds, clients=asked.clients, kill_every=asked.kill_every)
            found = figures(load, clients=asked.clients)
            load.end(clients=asked.clients)
        check_log(load, log)
    text = json.dumps(found, indent=2)
    print(text)  # noqa: T201
    if asked.out is not None:
        asked.out.write_text(text + "\n", "utf-8")
    sys.exit(bool(load.outcome.failures))


if __name__ == "__main__":
    main()
