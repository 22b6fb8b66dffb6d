import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mars.checkpoint import codes_digest, load_image_tokenizer
from mars.data.code_folder import EncodedSet, Engine, ShardWriter, encode_folder, local_engine
from mars.data.crops import Sizes
from mars.data.encode import Encoder
from mars.data.loader import Loader
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, Record, read_codes, read_pictures
from mars.errors import DataError
from mars.image_tokenizer.model import ImageTokenizer

SIZES = Sizes(factor=16, sizes=(48, 96), crop="random", aspect_buckets=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An encoder computes with one thread, here in the tests' own process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, spoiled_folder: Any) -> Path:
    """Shards of 10 pictures each, as somebody may have made them who looked at nothing: files of the spoiled folder,
    every third sound one and two of every kind of damage."""
    path = tmp_path_factory.mktemp("pictures") / "set"
    spoiled = [name for name in sorted(spoiled_folder.refused) if name.rpartition(".")[0].endswith(("-0", "-1"))]
    names = spoiled_folder.ingested[::3] + [name for name in spoiled if not name.endswith(".json")]
    random.Random(0).shuffle(names)
    with ShardFolder(path, settings={}, max_pictures=10) as folder:
        for number, name in enumerate(names):
            caption = Caption(text=name, language="en", kind="original")
            record = Record(
                key=f"k{number:03d}", concept=name, style="", split="train", source="t", licence="", captions=(caption,)
            )
            folder.add(Picture(record=record, content=(spoiled_folder.path / name).read_bytes()), consumed=number)
        folder.finish()
    return path


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    tokenizer, _ = load_image_tokenizer(tiny_model)
    return Encoder(load=load_image_tokenizer, folder=tiny_model, digest=codes_digest(tokenizer), sizes=SIZES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path, encoder: Encoder) -> Path:
    """The codes of `pictures` by a run that nothing stopped. Read only."""
    out = tmp_path_factory.mktemp("codes") / "whole"
    encode_folder(pictures, encoder=encoder, out=out, engine=local_engine(workers=0))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_picture_is_encoded_at_each_size_or_listed(pictures: Path, whole: Path, spoiled_folder: Any) -> None:
    names = {picture.record.key: picture.record.concept for picture in read_pictures(pictures)}
    expected = {
        name: word for name, word in spoiled_folder.refused.items() if name in names.values() and word != "UTF-8"
    }
    assert len(expected) == 24
    refused = [json.loads(line) for line in (whole / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert {names[entry["key"]] for entry in refused} == expected.keys()
    assert all(expected[names[entry["key"]]] in entry["reason"] for entry in refused)
    assert {entry["source"] for entry in refused} <= {path.name for path in pictures.glob("*.tar")}
    index = json.loads((whole / "dataset.json").read_text("utf-8"))
    assert index["finished"]
    assert (index["pictures"], index["refused"]) == (len(names) - len(refused), len(refused))
    for size in ("48", "96"):
        found = [item for path in sorted((whole / size).iterdir()) for item in read_codes(path)[0]]
        assert [item.record.key for item in found] == sorted(names.keys() - {entry["key"] for entry in refused})
        assert len({item.codes.shape for item in found}) > 1
        assert all(item.codes.size <= (int(size) // 16) ** 2 for item in found)


def test_the_loader_reads_a_size_or_pairs_of_two(whole: Path) -> None:
    weights: dict[str, Any] = {"seed": 0, "kinds": {"original": 1.0}, "languages": {"en": 1.0}}
    small, both = Loader([whole / "48"], **weights), Loader([whole], scale=2, **weights)
    assert len(small) == len(both) == json.loads((whole / "dataset.json").read_text("utf-8"))["pictures"]
    assert {(2 * rows, 2 * columns) for rows, columns in small.grids} == set(both.grids)
    (whole / "dataset.json").rename(whole / "aside")
    try:
        (whole / "dataset.json").write_text('{"finished": false}')
        for folder in (whole, whole / "48"):
            with pytest.raises(DataError, match=r"whole is not finished; run .* again"):
                Loader([folder], **weights)
    finally:
        (whole / "aside").replace(whole / "dataset.json")


class Stop(Exception):
    """Somebody stops the run."""


def stopping(stop: Callable[[str], None]) -> Engine:
    """The local engine, which calls `stop` before each thing that it does."""

    def encode(shards: Sequence[Path], writer: ShardWriter, told: Callable[[int], None]) -> None:
        def heard(more: int) -> None:
            stop("block")
            told(more)

        for shard in shards:
            stop("shard")
            local_engine(workers=0)([shard], writer, heard)

    return encode


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    stops = 0

    def perhaps(where: str) -> None:
        nonlocal stops
        if stops < 5 and chance.random() < 0.6:
            stops += 1
            raise Stop

    told: list[tuple[int, int | None]] = []
    for _ in range(20):
        try:
            encode_folder(
                pictures, encoder=encoder, out=tmp_path / "out", engine=stopping(perhaps),
                progress=lambda *done: told.append(done),
            )  # fmt: skip
            break
        except Stop:
            index = json.loads((tmp_path / "out" / "dataset.json").read_text("utf-8"))
            assert not index["finished"]
    assert stops == 5
    assert contents(tmp_path / "out") == contents(whole)
    total = sum(1 for _ in read_pictures(pictures))
    assert told[-1] == (total, total)


def test_a_finished_folder_is_left_as_it_is(pictures: Path, whole: Path, encoder: Encoder) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")}
    found = encode_folder(pictures, encoder=encoder, out=whole, engine=local_engine(workers=0))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")} == before
    assert found.pictures > 40
    assert found.refused == 24


@pytest.mark.parametrize("damage", ["missing", "cut", "index"])
def test_what_is_damaged_is_made_again(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "96" / "shard-000003.parquet"
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-7])
        case "index":
            (out / "shard-000003.json").unlink()
    encode_folder(pictures, encoder=encoder, out=out, engine=local_engine(workers=0))
    assert contents(out) == contents(whole)


def test_a_folder_of_another_run_is_refused_and_kept(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path, tiny_pictures: Path
) -> None:
    before = contents(whole)
    engine = local_engine(workers=0)
    others = [
        (pictures, replace(encoder, digest="sha256:0"), "made with image_tokenizer"),
        (pictures, replace(encoder, sizes=replace(SIZES, crop="center")), 'made with crop "random", got "center"'),
        (pictures, replace(encoder, sizes=replace(SIZES, sizes=(48,))), "made with sizes"),
        (tiny_pictures, encoder, "codes of other shards, such as shard-000000"),
    ]
    for source, other, message in others:
        with pytest.raises(DataError, match=message):
            encode_folder(source, encoder=other, out=whole, engine=engine)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="must be new or empty"):
        encode_folder(pictures, encoder=encoder, out=tmp_path / "mine", engine=engine)
    assert contents(whole) == before


def test_a_shard_that_was_changed_is_refused(tiny_pictures: Path, encoder: Encoder, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(tiny_pictures.read_bytes())
    engine = local_engine(workers=0)
    assert encode_folder(shard, encoder=encoder, out=tmp_path / "out", engine=engine) == EncodedSet(
        pictures=32, refused=0
    )
    before = contents(tmp_path / "out")
    shard.write_bytes(tiny_pictures.read_bytes().replace(b'"language": "en"', b'"language": "zh"'))  # of the same size
    assert shard.read_bytes() != tiny_pictures.read_bytes()
    with pytest.raises(DataError, match=r"codes of another a.tar; name another folder"):
        encode_folder(shard, encoder=encoder, out=tmp_path / "out", engine=engine)
    assert contents(tmp_path / "out") == before


def test_a_set_without_a_picture_that_can_be_encoded_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    for count, message in ((0, "holds no pictures to encode"), (3, r"none of 3 pictures .* \(not a picture")):
        with ShardFolder(tmp_path / f"in{count}", settings={}) as folder:
            for number in range(count):
                record = Record(
                    key=f"k{number}", concept="", style="", split="train", source="", licence="", captions=()
                )
                folder.add(Picture(record=record, content=b"spoiled"), consumed=number)
            folder.finish()
        out = tmp_path / f"out{count}"
        for _ in range(2):  # it stays one
            with pytest.raises(DataError, match=message):
                encode_folder(tmp_path / f"in{count}", encoder=encoder, out=out, engine=local_engine(workers=0))
    assert not (tmp_path / "out0").exists()
    assert len((tmp_path / "out3" / "quarantine.jsonl").read_text("utf-8").splitlines()) == 3


def test_engines_are_told_whole_paths(
    tiny_pictures: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of a cluster may begin in another folder."""
    (tmp_path / "a.tar").write_bytes(tiny_pictures.read_bytes())
    monkeypatch.chdir(tmp_path)
    told: list[Path] = []

    def engine(shards: Sequence[Path], writer: ShardWriter, progress: Callable[[int], None]) -> None:
        told.extend([*shards, writer.out, writer.encoder.folder])
        local_engine(workers=0)(shards, writer, progress)

    encode_folder(Path("a.tar"), encoder=encoder, out=Path("out"), engine=engine)
    assert told[:2] == [tmp_path / "a.tar", tmp_path / "out"]
    assert all(path.is_absolute() for path in told)


def test_two_runs_do_not_write_one_folder(tiny_pictures: Path, encoder: Encoder, tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="being written by another process"):
            encode_folder(tiny_pictures, encoder=encoder, out=tmp_path, engine=local_engine(workers=0))
    finally:
        os.close(lock)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, real = 9, os.replace

    def replace_file(source: Path, target: Path) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_file)
    with pytest.raises(DataError, match="disk is full") as caught:
        encode_folder(pictures, encoder=encoder, out=tmp_path / "out", engine=local_engine(workers=0))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "replace", real)
    done = [path.name for path in (tmp_path / "out").glob("shard-*.json")]
    assert len(done) == 2
    encode_folder(pictures, encoder=encoder, out=tmp_path / "out", engine=local_engine(workers=0))
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_how_many_encode_changes_no_byte(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path, workers: int
) -> None:
    encode_folder(pictures, encoder=encoder, out=tmp_path / "out", engine=local_engine(workers=workers))
    assert contents(tmp_path / "out") == contents(whole)


def load_one_that_kills(folder: Path) -> tuple[ImageTokenizer, None]:
    """An image tokenizer that ends its process where an image is all white."""
    tokenizer, _ = load_image_tokenizer(folder)
    real = tokenizer.encode

    def encode(images: torch.Tensor) -> torch.Tensor:
        if (images.amin(dim=(1, 2, 3)) == 1).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(images)

    tokenizer.encode = encode  # type: ignore[method-assign]
    return tokenizer, None


@pytest.mark.slow
def test_a_block_that_kills_its_worker_is_named_and_the_rest_encoded(
    encoder: Encoder, tmp_path: Path, spoiled_folder: Any
) -> None:
    from io import BytesIO

    from PIL import Image

    white = BytesIO()
    Image.new("RGB", (32, 32), "white").save(white, "PNG")
    good = (spoiled_folder.path / spoiled_folder.good[0]).read_bytes()
    with ShardFolder(tmp_path / "in", settings={}, max_pictures=150) as folder:
        for number in range(200):
            record = Record(
                key=f"k{number:03d}", concept="", style="", split="train", source="", licence="", captions=()
            )
            content = white.getvalue() if number == 100 else good
            folder.add(Picture(record=record, content=content), consumed=number)
        folder.finish()
    killer = replace(encoder, load=load_one_that_kills)
    found = encode_folder(tmp_path / "in", encoder=killer, out=tmp_path / "out", engine=local_engine(workers=2))
    assert found == EncodedSet(pictures=136, refused=64)
    refused = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert [entry["key"] for entry in refused] == [f"k{number:03d}" for number in range(64, 128)]
    assert {entry["reason"] for entry in refused} == {"something in its block ended the process that encoded it, twice"}


def whole_shards(out: Path) -> int:
    return len(list(out.glob("shard-*.json")))


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_ends_with_the_same_bytes(
    pictures: Path, whole: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out, chance = tmp_path / "out", random.Random(0)
    command: list[str | Path] = [sys.executable, "-c", "from mars.cli import main; main()", "data", "encode", pictures]
    command += ["--image-tokenizer", encoder.folder, "--out", out, "--workers", "2"]
    command += ["--size", "48", "--size", "96", "--crop", "random", "--aspect-buckets"]
    kills = done = 0
    while kills < 5:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted, wait = done + chance.randrange(2), chance.random() / 10
        while run.poll() is None and not ((out / "dataset.json").is_file() and whole_shards(out) >= wanted):
            time.sleep(0.005)
        time.sleep(wait)
        run.kill()
        if run.wait() == 0:  # too late
            shutil.rmtree(out)
            done = 0
            continue
        kills += 1
        assert whole_shards(out) >= done  # what was done is not lost
        done = whole_shards(out)
    subprocess.run(command, check=True, capture_output=True)
    assert contents(out) == contents(whole)
