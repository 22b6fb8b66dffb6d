import errno
import fcntl
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, Record, Suffix, read_pictures, shard_paths
from mars.errors import DataError
from tests.conftest import files_end_at

COUNT = 23
SETTINGS = {"source": "somewhere", "colours": [1, 2]}


def picture(index: int) -> Picture:
    record = Record(
        key=f"k{index}", concept="c", style="s", split="train", source="t", licence="CC0-1.0", width=32, height=16,
        captions=(Caption(text=f"第 {index} 幅", language="zh", kind="original"),), scores={"beauty": index / 8},
        url=f"https://pictures.example/{index}",
    )  # fmt: skip
    content = np.random.default_rng(index).bytes(200 + 37 * index)
    return Picture(record=record, content=content, suffix=("png", "jpg", "webp")[index % 3])


def open_folder(path: Path, **changes: Any) -> ShardFolder:
    options: dict[str, Any] = {"settings": SETTINGS, "max_pictures": 5, "max_bytes": 2500} | changes
    return ShardFolder(path, **options)


def write(path: Path, *, stop_at: int | None = None) -> None:
    """Pictures with every fourth item refused; stops without a word before item `stop_at`."""
    with open_folder(path) as folder:
        if folder.finished:
            return
        for index in range(folder.consumed or 0, COUNT):
            if index == stop_at:
                return
            if index % 4 == 3:
                folder.note("quarantine", {"source": f"ümlaut {index}", "reason": "bad"})
            else:
                folder.add(picture(index), consumed=index + 1)
        folder.finish()


def contents(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "whole"
    write(path)
    return path


def test_pictures_come_back_as_they_were_added(whole: Path) -> None:
    assert list(read_pictures(whole)) == [picture(index) for index in range(COUNT) if index % 4 != 3]
    shards = shard_paths(whole)
    assert [one.name for one in shards] == [f"shard-{index:06d}.tar" for index in range(len(shards))]
    assert len(shards) > 3
    counts = [json.loads(one.with_suffix(".json").read_text())["pictures"] for one in shards]
    assert max(counts) == 5, "the limit of pictures was never reached"
    assert min(counts[:-1]) < 5, "the limit of bytes was never reached"
    refused = [json.loads(line)["source"] for line in (whole / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert refused == [f"ümlaut {index}" for index in range(3, COUNT, 4)]


def test_a_run_that_is_stopped_anywhere_makes_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    wanted = contents(whole)
    for stop in range(0, COUNT, 2):
        out = tmp_path / f"stopped-{stop}"
        write(out, stop_at=stop)
        with pytest.raises(DataError, match="is not finished; run the command"):
            shard_paths(out)
        write(out, stop_at=(stop + COUNT) // 2)
        write(out)
        assert contents(out) == wanted, stop


def write_and_die(path: Path, *, calls: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Writes in a process of its own that dies, cleaning nothing up, at a call that makes something last."""
    child = os.fork()
    if child == 0:
        left = calls

        def dying(function: Any) -> Any:
            def called(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*arguments)

            return called

        monkeypatch.setattr(os, "replace", dying(os.replace))
        monkeypatch.setattr(os, "fsync", dying(os.fsync))
        try:
            write(path)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_run_that_dies_at_any_moment_makes_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    while write_and_die(tmp_path / f"{calls}", calls=calls, monkeypatch=monkeypatch):
        write(tmp_path / f"{calls}")
        assert contents(tmp_path / f"{calls}") == contents(whole), calls
        calls += 3  # of five in a shard, so that every one of them is tried
    assert calls > 5 * len(list(whole.glob("*.tar")))


@pytest.fixture
def mixed(tmp_path: Path, picture_file: Callable[..., bytes]) -> Path:
    """Real pictures of all three kinds; the first ones have no caption, score or URL."""
    kinds: tuple[tuple[str, Suffix], ...] = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))
    with ShardFolder(tmp_path / "mixed", settings={}, max_pictures=8) as folder:
        for index in range(24):
            kind, suffix = kinds[index // 8 if index < 16 else index % 3]
            record = picture(index).record
            if index < 8:
                record = replace(record, captions=(), scores={}, url=None)
            folder.add(Picture(record=record, content=picture_file(index, kind), suffix=suffix), consumed=index)
        folder.finish()
    return tmp_path / "mixed"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_webdataset_reads_the_shards(mixed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in shard_paths(mixed)]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [f"k{index}" for index in range(24)]
    for sample, wanted in zip(found, read_pictures(mixed), strict=True):
        assert sample["json"] == json.loads(json.dumps(asdict(wanted.record)))
        np.testing.assert_array_equal(np.asarray(sample[wanted.suffix]), wanted.pixels())
    gc.collect()


def test_datasets_reads_the_folder(mixed: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    found = datasets.load_dataset(str(mixed), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 24
    for sample, wanted in zip(found, read_pictures(mixed), strict=True):
        assert sample["__key__"] == wanted.record.key
        assert sample["json"] == json.loads(json.dumps(asdict(wanted.record)))
        np.testing.assert_array_equal(np.asarray(sample[wanted.suffix]), wanted.pixels())


@pytest.mark.slow
def test_ray_reads_the_shards(mixed: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    code = (
        "import json, sys, ray\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "rows = ray.data.read_webdataset(sys.argv[1:], decoder=None).take_all()\n"
        "print(json.dumps({row['__key__']: [json.loads(row['json']), "
        "*(len(row[kind]) for kind in ('png', 'jpg', 'webp') if isinstance(row.get(kind), bytes))] for row in rows}))\n"
    )
    paths = [str(path) for path in shard_paths(mixed)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        one.record.key: [json.loads(json.dumps(asdict(one.record))), len(one.content)] for one in read_pictures(mixed)
    }


def test_a_finished_folder_is_left_as_it_is(whole: Path) -> None:
    before = {one: one.stat().st_mtime_ns for one in whole.iterdir()}
    with open_folder(whole) as folder:
        assert folder.finished
        assert folder.pictures == 18
        assert folder.lines == {"quarantine": 5}
    assert {one: one.stat().st_mtime_ns for one in whole.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": SETTINGS | {"source": "elsewhere"}}, 'made with source "somewhere", got "elsewhere"'),
        ({"settings": SETTINGS | {"more": 1}}, "made with more null, got 1"),
        ({"max_pictures": 6}, "made with shard_pictures 5, got 6"),
    ],
)
@pytest.mark.parametrize("stop", [None, 8])
def test_another_configuration_is_refused(tmp_path: Path, changes: Any, told: str, stop: int | None) -> None:
    write(tmp_path / "out", stop_at=stop)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=told), open_folder(tmp_path / "out", **changes):
        pass
    assert contents(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="must be new or empty"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="not a folder of shards"):
        shard_paths(tmp_path)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 512)])
def test_a_shard_that_was_changed_is_told(tmp_path: Path, change: Any) -> None:
    write(tmp_path / "out", stop_at=18)
    change(tmp_path / "out" / "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar is missing or was changed; remove .*out and make it again"):
        write(tmp_path / "out")


@pytest.mark.parametrize("stop", [None, 18])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_a_journal_that_was_removed_or_cut_is_told_and_nothing_is_changed(
    whole: Path, tmp_path: Path, change: Any, stop: int | None
) -> None:
    out = tmp_path / "out"
    write(out, stop_at=stop)
    kept = (out / "quarantine.jsonl").read_bytes()
    change(out / "quarantine.jsonl")
    before = contents(out)
    with pytest.raises(DataError, match=r"quarantine.jsonl is missing or was cut; put it back, or remove .*out and "):
        write(out)
    assert contents(out) == before
    (out / "quarantine.jsonl").write_bytes(kept)
    write(out)
    assert contents(out) == contents(whole)


def test_a_journal_without_a_line_may_be_removed(tmp_path: Path) -> None:
    for finish in (False, True):
        with open_folder(tmp_path / "out") as folder:
            folder.add(picture(0), consumed=1)
            if finish:
                folder.finish()
        before = contents(tmp_path / "out")
        (tmp_path / "out" / "quarantine.jsonl").unlink()
        with open_folder(tmp_path / "out"):
            pass
        assert contents(tmp_path / "out") == before


def test_two_processes_never_write_the_same_folder(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out") as folder:
        folder.add(picture(0), consumed=1)
        with pytest.raises(DataError, match="is being written by another process"):
            write(tmp_path / "out")
        folder.finish()
    assert len(list(read_pictures(tmp_path / "out"))) == 1


def test_a_full_disk_is_one_line_and_the_run_continues_later(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, stop_at=12)
    with files_end_at(3000), pytest.raises(DataError) as caught:
        write(out)
    assert "; 5 pictures lie in whole shards, and the same command continues" in str(caught.value)
    assert "\n" not in str(caught.value)
    write(out)
    assert contents(out) == contents(whole)


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_folder(tmp_path / "out") as folder:
        folder.add(picture(0), consumed=1)
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(DataError, match=r"cannot write .*: the disk is full; 0 pictures lie in whole shards"):
            folder.add(picture(1), consumed=2)


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_folder(tmp_path / "out"):
        raise KeyError
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
