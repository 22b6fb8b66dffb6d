"""What `mars data` promises, in one piece: from a folder of files, good and spoiled, to codes."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mars.data.shards import read_codes, read_pictures
from tests.cli.conftest import Run
from tests.data.conftest import SpoiledFolder, write_spoiled

START = """
import functools
from mars.cli import main
from mars.data.curation import curate
curate.CHUNK = 20
curate.ShardFolder = functools.partial(curate.ShardFolder, max_pictures=9)  # so that there is much to be killed between
main()
"""


def start(command: list[str | Path]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", START, "data", *command], stdout=subprocess.DEVNULL)


def commands(source: Path, work: Path, model: Path) -> dict[str, list[str | Path]]:
    """The three commands, by the folder that each of them writes."""
    ingest: list[str | Path] = [
        "--caption",
        "text_en:en",
        "--caption",
        "text_zh:zh",
        "--shard-pictures",
        "9",
        "--workers",
        "1",
    ]
    curate: list[str | Path] = [
        "--set",
        "size.least_side=32",
        "--set",
        "captions.required=2",
        "--set",
        "duplicates.keep=first",
    ]
    encode: list[str | Path] = ["--image-tokenizer", model, "--size", "48", "--size", "96", "--crop", "random"]
    return {
        "set": ["ingest", source, "--out", work / "set", *ingest],
        "good": ["curate", work / "set", "--out", work / "good", *curate],
        "codes": ["encode", work / "good", "--out", work / "codes", *encode, "--workers", "1"],
        "ray": ["encode", work / "good", "--out", work / "ray", *encode, "--workers", "2", "--engine", "ray"],
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_every_spoiled_file_is_told(spoiled: SpoiledFolder, work: Path) -> None:
    refused = [json.loads(line) for line in (work / "set" / "quarantine.jsonl").read_text("utf-8").splitlines()]
    reasons = {line["source"].partition("/")[2]: line["reason"] for line in refused}
    assert reasons.keys() == spoiled.refused.keys()
    assert all(word in reasons[name] for name, word in spoiled.refused.items())
    names = {one.record.key: spoiled.name(one.record.url) for one in read_pictures(work / "set")}
    dropped = [json.loads(line) for line in (work / "good" / "dropped.jsonl").read_text("utf-8").splitlines()]
    rules = dict.fromkeys(spoiled.duplicates, "duplicate") | dict.fromkeys(spoiled.mislabelled, "mislabelled")
    assert {names[line["key"]]: line["rule"] for line in dropped} == rules | dict.fromkeys(spoiled.extreme, "side")
    for size in ("48", "96"):
        coded = [item for path in (work / "codes" / size).iterdir() for item in read_codes(path)[0]]
        assert sorted(names[item.record.key] for item in coded) == sorted(spoiled.good)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a dozen processes that import torch: on a machine that does other work
def test_killed_five_times_the_bytes_are_those_of_a_run_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    spoiled = write_spoiled(tmp_path / "pictures")
    seconds = {}
    for name, command in commands(spoiled.path, tmp_path / "whole", tiny_model).items():
        began = time.monotonic()
        assert start(command).wait() == 0
        seconds[name] = time.monotonic() - began
    check_every_spoiled_file_is_told(spoiled, tmp_path / "whole")
    assert contents(tmp_path / "whole" / "ray") == contents(tmp_path / "whole" / "codes")
    again, chance = commands(spoiled.path, tmp_path / "killed", tiny_model), random.Random(0)
    for name, kills in {"set": 2, "good": 2, "codes": 1}.items():
        while kills:
            run = start(again[name])
            time.sleep(chance.uniform(0.5, 1) * seconds[name])
            run.kill()
            kills -= run.wait() != 0
            if run.returncode == 0:  # it was too quick
                shutil.rmtree(tmp_path / "killed" / name)
        assert start(again[name]).wait() == 0
        assert contents(tmp_path / "killed" / name) == contents(tmp_path / "whole" / name), name


def test_a_style_that_is_none_is_one_line(run: Run) -> None:
    code, _, err = run("data", "emoji", "--style", "crayon")
    assert (code, err.count("\n")) == (2, 1)
    assert "style must be one of noto, twemoji" in err
