import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from mars.config import from_dict
from mars.data.curation import curate as module
from mars.data.curation.config import CurationConfig
from mars.data.curation.curate import curate
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError
from mars.files import files_digest
from tests.data.conftest import SpoiledFolder

RULES = {
    "size": {"least_side": 32},
    "captions": {"required": 2},
    "scorers": [
        {"scorer": "mars.data.curation.scorers:Colourfulness"},
        {"scorer": "mars.data.curation.scorers:Sharpness"},
    ],
}


def config(**table: object) -> CurationConfig:
    return from_dict(CurationConfig, {**RULES, **table})


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_spoiled_picture_is_dropped_with_its_reason_and_no_good_one(
    tmp_path: Path, spoiled_set: Path, spoiled_folder: SpoiledFolder
) -> None:
    report = curate(spoiled_set, out=tmp_path / "out", config=config(duplicates={"keep": "first"}))
    before = {picture.record.key: picture for picture in read_pictures(spoiled_set)}
    names = {key: spoiled_folder.name(picture.record.url) for key, picture in before.items()}
    dropped = {names[line["key"]]: line for line in lines(tmp_path / "out" / "dropped.jsonl")}
    reasons = {
        **dict.fromkeys(spoiled_folder.duplicates, "duplicate"),
        **dict.fromkeys(spoiled_folder.mislabelled, "mislabelled"),
        **dict.fromkeys(spoiled_folder.extreme, "side"),
    }
    assert {name: line["rule"] for name, line in dropped.items()} == reasons
    for copy, original in spoiled_folder.duplicates.items():
        assert names[dropped[copy]["value"]] == original
    kept = list(read_pictures(tmp_path / "out"))
    assert {names[picture.record.key] for picture in kept} == set(spoiled_folder.good)
    assert report["kept"] == len(spoiled_folder.good)
    assert report["dropped"] == {"duplicate": 30, "mislabelled": 20, "side": 10}


def test_kept_pictures_keep_their_bytes_and_gain_scores_and_size(tmp_path: Path, spoiled_set: Path) -> None:
    curate(spoiled_set, out=tmp_path / "out", config=config())
    before = {picture.record.key: picture for picture in read_pictures(spoiled_set)}
    kept = list(read_pictures(tmp_path / "out"))
    assert kept
    for picture in kept:
        old, record = before[picture.record.key], picture.record
        assert (picture.content, picture.suffix) == (old.content, old.suffix)
        assert record.captions == old.record.captions
        assert record.scores.keys() == {"colourfulness", "sharpness"}
        assert (record.width, record.height) == (64, 64)
        assert (record.source, record.url, record.licence) == (old.record.source, old.record.url, old.record.licence)


def test_a_mislabelled_caption_goes_and_its_picture_stays_where_one_is_enough(
    tmp_path: Path, spoiled_set: Path, spoiled_folder: SpoiledFolder
) -> None:
    curate(spoiled_set, out=tmp_path / "out", config=config(captions={"required": 1}))
    noted = {line["text"] for line in lines(tmp_path / "out" / "captions.jsonl")}
    kept = {caption.text for picture in read_pictures(tmp_path / "out") for caption in picture.record.captions}
    assert any("зима" in text for text in noted)
    assert not noted & kept
    assert not any("зима" in text for text in kept)


def test_of_two_copies_the_better_stays(
    tmp_path: Path, make_picture: Callable[..., Picture], write_set: Callable[..., Path]
) -> None:
    long = [("a small red house on a hill behind a lake", "en")]
    pictures = [
        make_picture("small", number=1),
        make_picture("large", number=1, size=(128, 128)),
        make_picture("other", number=2),
        make_picture("longer", number=2, captions=long),
        make_picture("same", number=2, captions=long),
    ]
    source = write_set(tmp_path / "set", pictures)
    for keep, stays in (("best", ["large", "longer"]), ("first", ["small", "other"])):
        rules = from_dict(CurationConfig, {"duplicates": {"keep": keep}})
        curate(source, out=tmp_path / keep, config=rules)
        assert [picture.record.key for picture in read_pictures(tmp_path / keep)] == stays


class Watched:
    """Counts what it is asked to score."""

    name, digest = "watched", ""
    seen = 0

    def score(self, images: Sequence[Image.Image], captions: Sequence[object]) -> list[float | None]:
        Watched.seen += len(images)
        return [0.5] * len(images)


def test_a_run_that_is_stopped_while_judging_goes_on_where_it_was(
    tmp_path: Path, spoiled_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 20)
    rules = config(scorers=[{"scorer": f"{__name__}:Watched"}])
    curate(spoiled_set, out=tmp_path / "whole", config=rules)
    once, Watched.seen = Watched.seen, 0

    def stop(done: int, total: int) -> None:
        assert total == 120
        if done in (40, 80):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            curate(spoiled_set, out=tmp_path / "out", config=rules, progress=stop)
        assert not list((tmp_path / "out").glob("shard-*"))
    curate(spoiled_set, out=tmp_path / "out", config=rules, progress=stop)
    assert Watched.seen == once
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


class Weighted:
    """What it says of a picture is what stands in its file of weights."""

    name = "weighted"

    def __init__(self, *, weights: str) -> None:
        self.digest, self.says = files_digest([Path(weights)]), float(Path(weights).read_text())

    def score(self, images: Sequence[Image.Image], captions: Sequence[object]) -> list[float | None]:
        return [self.says] * len(images)


def test_a_run_never_goes_on_with_the_weights_of_another_scorer(
    tmp_path: Path, spoiled_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 20)
    weights = tmp_path / "weights"
    rules = config(scorers=[{"scorer": f"{__name__}:Weighted", "options": {"weights": str(weights)}}])

    def stop(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    weights.write_text("0.25")
    with pytest.raises(KeyboardInterrupt):
        curate(spoiled_set, out=tmp_path / "out", config=rules, progress=stop)
    weights.write_text("0.75")
    with pytest.raises(DataError, match="was made with scorers .*; name another folder, or remove it"):
        curate(spoiled_set, out=tmp_path / "out", config=rules)
    weights.write_text("0.25")
    curate(spoiled_set, out=tmp_path / "out", config=rules)
    assert {picture.record.scores["weighted"] for picture in read_pictures(tmp_path / "out")} == {0.25}


def test_what_is_done_is_not_done_again(tmp_path: Path, spoiled_set: Path) -> None:
    report = curate(spoiled_set, out=tmp_path / "out", config=config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert curate(spoiled_set, out=tmp_path / "out", config=config()) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_another_configuration_source_or_list_is_refused(
    tmp_path: Path, spoiled_set: Path, make_picture: Callable[..., Picture], write_set: Callable[..., Path]
) -> None:
    listed = tmp_path / "gone.txt"
    listed.write_text("some-key\n")
    out = tmp_path / "out"
    rules = config(remove=[str(listed)])
    curate(spoiled_set, out=out, config=rules)
    before = digests(out)
    with pytest.raises(DataError, match="was made with size"):
        curate(spoiled_set, out=out, config=config(remove=[str(listed)], size={"least_side": 9}))
    with pytest.raises(DataError, match="was made with source"):
        curate(write_set(tmp_path / "other", [make_picture()]), out=out, config=rules)
    listed.write_text("some-key\nanother-key\n")
    with pytest.raises(DataError, match="was made with remove"):
        curate(spoiled_set, out=out, config=rules)
    assert digests(out) == before


def test_a_set_is_not_curated_onto_itself_and_other_folders_are_safe(tmp_path: Path, spoiled_set: Path) -> None:
    before = digests(spoiled_set)
    with pytest.raises(DataError):
        curate(spoiled_set, out=spoiled_set, config=config())
    assert digests(spoiled_set) == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="must be new or empty"):
        curate(spoiled_set, out=tmp_path, config=config())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_set_of_which_nothing_stays_is_told_as_such(tmp_path: Path, spoiled_set: Path) -> None:
    report = curate(spoiled_set, out=tmp_path / "out", config=config(size={"least_side": 1000}))
    assert report["kept"] == 0
    assert report["dropped"] == {"side": 120}
    assert list(read_pictures(tmp_path / "out")) == []


SCRIPT = """
import functools, json, sys
from pathlib import Path
from mars.config import from_dict
from mars.data.curation import curate as module
from mars.data.curation.config import CurationConfig
module.CHUNK = 10
module.ShardFolder = functools.partial(module.ShardFolder, max_pictures=7)
module.curate(Path(sys.argv[1]), out=Path(sys.argv[2]), config=from_dict(CurationConfig, json.loads(sys.argv[3])))
"""


@pytest.mark.slow
def test_killed_five_times_the_result_is_that_of_a_run_that_was_left_alone(tmp_path: Path, spoiled_set: Path) -> None:
    def run(out: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", SCRIPT, spoiled_set, tmp_path / out, json.dumps(RULES)])

    began = time.monotonic()
    assert run("whole").wait() == 0
    whole, killed, chance = time.monotonic() - began, 0, random.Random(0)
    while killed < 5:
        process = run("out")
        time.sleep(chance.uniform(0.3, 1) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:  # it was too quick to be killed
            shutil.rmtree(tmp_path / "out")
    assert run("out").wait() == 0
    expected = digests(tmp_path / "whole")
    assert len(expected) > 20
    assert digests(tmp_path / "out") == expected
