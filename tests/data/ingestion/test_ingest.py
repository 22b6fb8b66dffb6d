import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mars.data.ingestion import ingest as ingest_module
from mars.data.ingestion.ingest import ingest
from mars.data.ingestion.records import CaptionColumn, Columns
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError

BOTH = Columns(captions=(CaptionColumn.parse("text_en:en"), CaptionColumn.parse("text_zh:zh")), licence="CC0-1.0")


def contents(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.iterdir()}


def reasons(out: Path) -> dict[str, str]:
    """The reason by name below the source."""
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text("utf-8").splitlines()]
    found = {line["source"].partition("/")[2]: line["reason"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_every_spoiled_file_is_told_and_none_is_in_the_shards(
    spoiled_folder: Any, tmp_path: Path, workers: int
) -> None:
    report = ingest([spoiled_folder.path], out=tmp_path / "out", columns=BOTH, workers=workers, max_pictures=50)
    pictures = list(read_pictures(tmp_path / "out"))
    assert [spoiled_folder.name(picture.record.url) for picture in pictures] == spoiled_folder.ingested
    told = reasons(tmp_path / "out")
    assert told.keys() == spoiled_folder.refused.keys()
    assert {name: word for name, word in spoiled_folder.refused.items() if word not in told[name]} == {}
    assert (report.pictures, report.shards, sum(report.refused.values())) == (len(pictures), 3, len(told))
    assert report.refused["damaged"] == 40
    assert len({picture.record.key for picture in pictures}) == len(pictures)
    for picture, name in zip(pictures, spoiled_folder.ingested, strict=True):
        assert picture.content == (spoiled_folder.path / name).read_bytes()
        assert picture.pixels().shape == (picture.record.height, picture.record.width, 3)
        assert [caption.language for caption in picture.record.captions] == ["en", "zh"]
        assert picture.record.licence == "CC0-1.0"


def test_any_number_of_workers_makes_the_same_bytes(spoiled_folder: Any, tmp_path: Path) -> None:
    for workers in (0, 1):
        ingest([spoiled_folder.path], out=tmp_path / f"{workers}", columns=BOTH, workers=workers, max_pictures=40)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def as_table(folder: Path, rows: list[dict[str, Any]], name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        structs = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
        pq.write_table(pa.Table.from_pylist(structs), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_every_kind_of_source_gives_the_same_pictures(spoil: Any, tmp_path: Path) -> None:
    spoiled = spoil(tmp_path / "set")
    sources = {"folder": spoiled.path}
    rows = [
        {"image": name, **json.loads((spoiled.path / name).with_suffix(".json").read_text())}
        for name in spoiled.ingested
    ]
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        sources[name] = as_table(spoiled.path, rows, name)
    sources["t.tar"] = tmp_path / "t.tar"
    with tarfile.open(sources["t.tar"], "w") as tar:
        for number, name in enumerate(spoiled.ingested):
            path = spoiled.path / name
            tar.add(path, f"{number:09d}{path.suffix}")
            tar.add(path.with_suffix(".json"), f"{number:09d}.json")
    found: dict[str, list[Picture]] = {}
    for name, source in sources.items():
        columns = replace(BOTH, source="set")
        ingest([source], out=tmp_path / "out" / name, columns=columns)
        found[name] = [
            replace(picture, record=replace(picture.record, key="", concept=""))
            for picture in read_pictures(tmp_path / "out" / name)
        ]
    assert len(found["folder"]) == len(spoiled.ingested)
    assert all(pictures == found["folder"] for pictures in found.values())


def test_sources_follow_each_other_and_a_run_that_is_stopped_goes_on(
    spoiled_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [spoiled_folder.path / name for name in ("e", "a", "c", "d", "b")]
    ingest(sources, out=tmp_path / "whole", columns=BOTH, max_pictures=7)
    whole = contents(tmp_path / "whole")
    look, left = ingest_module._look, 0

    def stopping(task: Any, *, columns: Columns) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return look(task, columns=columns)

    monkeypatch.setattr(ingest_module, "_look", stopping)
    for allowed in (0, 20, 25, 45, 40, 160, 30):
        left = allowed
        with pytest.raises(KeyboardInterrupt):
            ingest(sources, out=tmp_path / "out", columns=BOTH, max_pictures=7)
    left = 1000
    assert ingest(sources, out=tmp_path / "out", columns=BOTH, max_pictures=7).pictures == 120
    assert contents(tmp_path / "out") == whole
    again = ingest(sources, out=tmp_path / "out", columns=BOTH, max_pictures=7)
    assert again.pictures == 120
    assert contents(tmp_path / "out") == whole


def test_what_would_mix_is_refused(spoil: Any, tmp_path: Path) -> None:
    spoiled = spoil(tmp_path / "set")
    out = tmp_path / "out"
    ingest([spoiled.path], out=out, columns=BOTH)
    before = contents(out)
    with pytest.raises(DataError, match="out was made with columns "):
        ingest([spoiled.path], out=out)
    with pytest.raises(DataError, match='out was made with sources .*"set"'):
        ingest([spoiled.path / "a"], out=out, columns=BOTH)
    (spoiled.path / "new.png").write_bytes(b"x")
    with pytest.raises(DataError, match='out was made with files of set "'):
        ingest([spoiled.path], out=out, columns=BOTH)
    assert contents(out) == before
    with pytest.raises(DataError, match="sources must have different names, got a twice"):
        ingest([spoiled.path / "a", spoiled.path / "a"], out=tmp_path / "two")
    with pytest.raises(DataError, match="shards must lie outside their source"):
        ingest([spoiled.path], out=spoiled.path / "shards")


def test_a_source_without_a_picture_that_can_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of 1 files is a picture that can be used; .*quarantine.jsonl says"):
            ingest([tmp_path / "set"], out=tmp_path / "out")
        assert reasons(tmp_path / "out") == {"a.png": "empty file"}


def test_captions_may_be_missing_and_are_counted(tmp_path: Path, picture_file: Callable[..., bytes]) -> None:
    (tmp_path / "set").mkdir()
    for number in range(5):
        (tmp_path / "set" / f"{number}.png").write_bytes(picture_file(number))
    (tmp_path / "set" / "3.txt").write_text("a picture")
    report = ingest([tmp_path / "set"], out=tmp_path / "out", max_pictures=2)
    assert (report.pictures, report.without_caption, report.refused) == (5, 4, {})


def test_every_source_is_read_for_the_captions_that_it_has(tmp_path: Path, picture_file: Callable[..., bytes]) -> None:
    """A folder with texts beside, a table in two languages, and one in a third way."""
    for name in ("photos", "lists"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture_file(1))
    (tmp_path / "photos" / "a.txt").write_text("a tom")
    row = {"image": "a.png", "text": "a cat", "text_zh": "一只猫"}
    sources = [tmp_path / "photos", as_table(tmp_path / "lists", [row], "b.csv")]
    sources.append(as_table(tmp_path / "lists", [{"image": "a.png", "long": "a black cat"}], "c.parquet"))
    named = tuple(map(CaptionColumn.parse, ["txt:en", "text:en", "text_zh:zh:translated", "long:en:dense"]))
    report = ingest(sources, out=tmp_path / "out", columns=Columns(captions=named))
    found = [[(one.text, one.kind) for one in item.record.captions] for item in read_pictures(tmp_path / "out")]
    assert found == [
        [("a tom", "original")],
        [("a cat", "original"), ("一只猫", "translated")],
        [("a black cat", "dense")],
    ]
    assert report.lacks == {"b.csv": ("txt", "long"), "c.parquet": ("txt", "text", "text_zh")}
    with pytest.raises(DataError, match="b.csv has no column txt or long; it has image, text, text_zh: name that of "):
        ingest(sources, out=tmp_path / "new", columns=Columns(captions=named[::3]))
    with pytest.raises(DataError, match="no source has the column texte of captions"):
        ingest(sources[1:], out=tmp_path / "new", columns=Columns(captions=(*named[1:], CaptionColumn.parse("texte"))))
    assert not (tmp_path / "new").exists()


def start(arguments: list[str | Path]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "from mars.cli import main; main()", "data", "ingest", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_random_moments_and_continued_it_makes_the_same_bytes(spoiled_folder: Any, tmp_path: Path) -> None:
    options = ["--caption", "text_en:en", "--caption", "text_zh:zh", "--shard-pictures", "2", "--workers", "1"]
    assert start([spoiled_folder.path, "--out", tmp_path / "whole", *options]).wait() == 0
    chance = random.Random(7)
    for _ in range(5):
        running = start([spoiled_folder.path, "--out", tmp_path / "out", *options])
        goal = len(list((tmp_path / "out").glob("shard-*.json"))) + chance.randint(1, 9)
        while running.poll() is None and len(list((tmp_path / "out").glob("shard-*.json"))) < goal:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert not json.loads((tmp_path / "out" / "dataset.json").read_text())["finished"]
    assert start([spoiled_folder.path, "--out", tmp_path / "out", *options]).wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


PEAK = """
import re, sys
from pathlib import Path
from mars.data.ingestion.ingest import ingest
ingest([Path(sys.argv[1])], out=Path(sys.argv[2]), workers=0)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, picture_file: Callable[..., bytes], kind: str) -> None:
    content = picture_file(1)
    (tmp_path / "a.png").write_bytes(content)
    # Pools of Arrow and of each thread keep some 15 megabytes in some runs, and nothing in others.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    peaks = []
    for count in (500, 8000):
        path = tmp_path / f"{count}.{kind}"
        if kind == "jsonl":
            path.write_text('{"image": "a.png", "text": "a cat"}\n' * count)
        elif kind == "parquet":
            pq.write_table(pa.table({"image": [content] * count, "text": ["a cat"] * count}), path, row_group_size=100)
        else:
            with tarfile.open(path, "w") as tar:
                for number in range(count):
                    member = tarfile.TarInfo(f"{number}.png")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        runs = []
        for attempt in range(2):
            command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"out-{count}-{attempt}")]
            runs.append(int(subprocess.run(command, capture_output=True, check=True, env=environment).stdout))
        peaks.append(min(runs))
    print(kind, [peak // 1024 for peak in peaks], "MB")
    assert peaks[1] - peaks[0] < 12_000, peaks
