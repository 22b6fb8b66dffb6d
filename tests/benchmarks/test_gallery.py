from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.gallery import MOST_BYTES, Curator, Section, Shown, is_name, names_of, small_webp, write_gallery
from mars.data.shards import read_pictures
from mars.errors import DataError
from mars.evaluation.drawing import Artist
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline


@pytest.fixture
def curator(pipe: MarsPipeline, tiny_pictures: Path) -> Curator:
    artist = Artist(pipe=pipe, sampling=Sampling(temperature=1.0), seed=3)
    return Curator(artist=artist, shard={one.record.key: one for one in read_pictures(tiny_pictures)}, count=2)


def test_a_name_is_known_in_any_case_and_before_a_style() -> None:
    names = ["Cat Face", "kitten"]
    assert is_name(" cat face", names)
    assert is_name("Kitten, Noto style", names)
    assert is_name("猫脸，Noto 风格", ["猫脸"])
    assert not is_name("cat", names)
    assert not is_name("", names)


def test_names_are_all_words_of_a_language(curator: Curator) -> None:
    assert names_of(curator.shard["k3"], "en") == ["3", "t3", "p3"]
    assert names_of(curator.shard["k3"], "zh") == ["图 3", "图 t3", "图 p3"]


def test_a_sheet_is_small_or_an_error() -> None:
    dice = np.random.default_rng(0)
    noisy = Image.fromarray(dice.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    assert len(small_webp(noisy)) < MOST_BYTES
    with pytest.raises(DataError, match="show fewer pictures"):
        small_webp(Image.fromarray(dice.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)))


def test_a_page_tells_failures_and_no_verdict_where_nobody_judges(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "red")
    rights = (True, False, None)
    shown = [
        Shown(prompt="a | b", seed=place, verdict=f"v{place}", right=right, drawn=image, beside=image)
        for place, right in enumerate(rights)
    ]
    write_gallery(tmp_path, [Section(title="Two words", about="About.", shown=shown)], about="All of it.")
    page = (tmp_path / "gallery.md").read_text("utf-8")
    assert "About. 1 of 2 right." in page
    assert "| 2 | a \\| b | 1 | v1 |" in page
    assert "![Two words](gallery/two-words.webp)" in page
    with Image.open(tmp_path / "gallery" / "two-words.webp") as sheet:
        assert sheet.format == "WEBP"


def test_captions_edits_and_upscaled_pictures_are_shown_beside_what_they_were_made_from(
    curator: Curator, tiny_upscaler: Path
) -> None:
    captions = curator.captions()
    assert [one.prompt.split(")")[0] for one in captions.shown] == ["(train", "(train", "(picture", "(picture"]
    assert all(one.right is not None for one in captions.shown)
    edits = curator.edits()
    assert len(edits.shown) == 9  # of four drawings, three have a next one
    assert {one.right for one in edits.shown} == {None}
    before, after = (np.asarray(one, dtype=float) for one in (edits.shown[0].beside, edits.shown[0].drawn))
    assert np.abs(before - after)[:, :16].max() == 0  # the left half stays, but for the seam
    assert np.abs(before - after)[:, 28:].max() > 0
    (first, *_) = curator.upscaled(MarsPipeline.from_pretrained(tiny_upscaler)).shown
    assert first.drawn.size == first.beside.size == (96, 64)
    assert first.prompt == edits.shown[1].prompt
    assert first.seed == 3
