import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mars.errors import ImageError, RequestError
from mars.generation.sampling import Sampling
from mars.picture import on_white_page
from mars.pipeline import MarsPipeline
from mars.pipeline.editing import mask_cells, on_black_page, read_margins, read_mask, varied_cells, with_margins

SIZE = (48, 32)
WARM = Sampling(temperature=1.5)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(*box: int, size: tuple[int, int] = SIZE) -> Image.Image:
    drawn = Image.new("L", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=255)
    return drawn


def test_a_mask_is_drawn_anew_and_the_rest_keeps_its_codes_and_pixels(pipe: MarsPipeline, picture: Image.Image) -> None:
    before = pipe.encode(picture)
    drawn = pipe.edit(picture, "红苹果", mask=mask(17, 2, 30, 9), n=4, seed=1, sampling=WARM)
    assert drawn.codes.shape == (4, 2, 3)
    kept = torch.tensor([[True, False, True], [True, True, True]])
    assert (drawn.codes[:, kept] == before[kept]).all()
    assert len(set(drawn.codes[:, 0, 1].tolist())) > 1
    for image in drawn.images:
        changed = np.abs(np.asarray(image, dtype=int) - np.asarray(picture, dtype=int)).max(axis=2) > 0
        assert changed[2:10, 17:31].mean() > 0.9
        assert not changed[:, :8].any()
        assert not changed[22:].any()
    assert json.loads(drawn.images[0].info["settings"])["edit"]["mask"] is True
    again = pipe.edit(picture, "红苹果", mask=mask(17, 2, 30, 9), seed=drawn.seeds[2], sampling=WARM)
    assert torch.equal(again.codes[0], drawn.codes[2])


def test_of_candidates_the_one_that_goes_best_with_the_rest_is_kept(pipe: MarsPipeline, picture: Image.Image) -> None:
    hole = mask(0, 0, 15, 15)
    drawn = pipe.edit(picture, "x", mask=hole, seed=3, sampling=Sampling(temperature=1.5, candidates=8))
    assert (drawn.codes[0].flatten()[1:] == pipe.encode(picture).flatten()[1:]).all()


def test_margins_are_drawn_around_a_picture(pipe: MarsPipeline) -> None:
    inner = Image.new("RGB", (16, 32), (200, 30, 40))
    drawn = pipe.edit(inner, "x", margins=(16, 0, 16, 0), seed=1, sampling=WARM)
    page = Image.new("RGB", SIZE, "white")
    page.paste(inner, (16, 0))
    wanted = pipe.encode(page)
    assert (drawn.codes[0][:, 1] == wanted[:, 1]).all()
    assert np.asarray(drawn.images[0])[:, 24].tolist() == [[200, 30, 40]] * 32
    assert np.asarray(drawn.images[0])[:, :12].std() > 0


def test_a_share_is_varied_in_places_that_the_seed_chooses(pipe: MarsPipeline, picture: Image.Image) -> None:
    before = pipe.encode(picture)
    drawn = pipe.edit(picture, vary=0.5, n=6, seed=1, sampling=WARM)
    changed = drawn.codes != before
    assert changed.flatten(1).sum(dim=1).max() <= 3
    assert len({tuple(row.tolist()) for row in changed.flatten(1)}) > 1
    whole = pipe.edit(picture, "x", vary=1.0, seed=1, sampling=WARM)
    alone = pipe("x", seed=1, sampling=WARM)
    assert torch.equal(whole.codes, alone.codes), "nothing is kept, so that it is an ordinary picture"


def test_masks_are_read_by_brightness_or_transparency() -> None:
    assert np.asarray(read_mask(mask(4, 4, 7, 7), size=SIZE)).sum() == 16 * 255
    clear = Image.new("RGBA", SIZE, (255, 255, 255, 255))
    clear.putpixel((3, 5), (0, 0, 0, 0))
    found = np.asarray(read_mask(clear, size=SIZE))
    assert found.sum() == 255
    assert found[5, 3] == 255
    grey = Image.new("L", SIZE, 127)
    grey.putpixel((0, 0), 128)
    assert np.asarray(read_mask(grey, size=SIZE)).sum() == 255


def test_a_cell_is_drawn_anew_if_any_of_its_pixels_is() -> None:
    one = mask(16, 16, 16, 16)
    assert mask_cells(one, grid=(2, 3)).tolist() == [[False] * 3, [False, True, False]]
    assert mask_cells(mask(15, 15, 16, 16), grid=(2, 3)).sum() == 4


def test_a_mask_lies_where_its_picture_lies_on_the_page() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    hole = mask(0, 0, 31, 63, size=(64, 64))
    picture.paste((0, 0, 0), (0, 0, 32, 64))
    page, fitted = on_white_page(picture, size=SIZE), on_black_page(hole, size=SIZE)
    assert ((np.asarray(page)[..., 0] < 128) == (np.asarray(fitted) > 127)).mean() > 0.97
    assert not np.asarray(fitted)[:, :8].any(), "the page beside the picture is kept"


def test_margins_and_shares_are_checked() -> None:
    page, hole = with_margins(Image.new("RGB", (20, 10)), (5, 0, 0, 6))
    assert page.size == hole.size == (25, 16)
    assert np.asarray(hole)[:10, 5:].max() == 0
    assert (np.asarray(hole) > 0).sum() == 25 * 16 - 200
    assert read_margins("8") == (8, 8, 8, 8)
    assert read_margins("1, 2,3,4") == (1, 2, 3, 4)
    codes = torch.zeros(4, 4)
    assert int(varied_cells(codes, share=0.01, seed=1).sum()) == 1
    assert int(varied_cells(codes, share=0.5, seed=1).sum()) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "an edit needs a mask, or margins, or a share to vary; give one of them"),
        ({"vary": 0.5, "margins": (1, 1, 1, 1)}, "give one of them"),
        ({"vary": 0.0}, r"a share to vary must lie in 0\.\.1 .* got 0\.0"),
        ({"vary": 1.1}, "got 1.1"),
        ({"margins": (0, 0, 0, 0)}, "one of them more than 0"),
        ({"margins": (-1, 0, 0, 3)}, "margins must be 0 to 4096 pixels"),
        ({"mask": mask(0, 0, 3, 3, size=(30, 20))}, "the mask must have the picture's size, 48x32 pixels, got 30x20"),
        ({"mask": Image.new("L", SIZE)}, "nothing is"),
        ({"vary": 0.5, "n": 0}, "got n = 0"),
    ],
)
def test_what_cannot_be_edited_is_one_line(
    pipe: MarsPipeline, picture: Image.Image, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        pipe.edit(picture, "x", **options)


def test_a_file_that_is_no_picture_is_one_line(pipe: MarsPipeline, picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"mask\.png is not a picture"):
        pipe.edit(picture, "x", mask=tmp_path / "mask.png")
