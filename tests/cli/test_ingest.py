from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mars.data.shards import Caption, read_pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("一只猫")
    (folder / "1.json").write_text('{"beauty": 0.5, "rights": "MIT"}')
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def test_a_folder_becomes_shards_and_the_rest_is_told(run: Run, photos: Path, tmp_path: Path) -> None:
    options = ["--caption", "txt:zh", "--column", "licence=rights", "--score", "beauty", "--workers", "0"]
    code, printed, told = run("data", "ingest", photos, "--out", tmp_path / "out", "--licence", "CC0-1.0", *options)
    assert (code, told) == (0, "")
    assert printed.splitlines() == [
        f"{tmp_path / 'out'}: 3 pictures in 1 shards",
        "  without a caption: 2",
        f"  refused: 1, listed in {tmp_path / 'out' / 'quarantine.jsonl'}",
        "    1 empty file",
    ]
    first, second, _ = (picture.record for picture in read_pictures(tmp_path / "out"))
    assert first.captions == (Caption(text="一只猫", language="zh", kind="original"),)
    assert (first.licence, second.licence, second.scores) == ("CC0-1.0", "MIT", {"beauty": 0.5})


def test_a_column_of_captions_that_a_source_lacks_is_told(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("image,text\n2.png,a cat\n")
    options = ["--caption", "txt:zh", "--caption", "text:en", "--workers", "0"]
    code, printed, told = run("data", "ingest", photos, photos / "list.csv", "--out", tmp_path / "out", *options)
    assert (code, told) == (0, "")
    assert "  no column txt in list.csv; its captions are the others that were named" in printed.splitlines()
    assert [one.text for one in list(read_pictures(tmp_path / "out"))[-1].record.captions] == ["a cat"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--column", "licence"], "--column must be ROLE=NAME, as image=photo, got 'licence'"),
        (["--column", "colour=c"], "--column must be ROLE=NAME with a role of image"),
        (["--caption", "a:en:poem"], "--caption must be COLUMN[:LANGUAGE[:KIND]]"),
    ],
)
def test_options_that_mean_nothing_are_one_line(
    run: Run, photos: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    code, printed, error = run("data", "ingest", photos, "--out", tmp_path / "out", *options)
    assert (code, printed) == (2, "")
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
