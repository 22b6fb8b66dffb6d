import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mars.cli import drawing
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(pipe: MarsPipeline, tmp_path: Path) -> Path:
    pipe("a red apple", seed=1).images[0].save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_a_picture_becomes_a_larger_one(run: Run, tiny_upscaler: Path, picture: Path) -> None:
    options = ["--prompt", "红苹果", "--seed", 3, "--temperature", 0.5, "--model", tiny_upscaler]
    code, out, err = run("upscale", picture, "--out", "a.png", "--json", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["pictures"] == [{"file": "a.png", "prompt": "红苹果", "seed": 3}]
    with Image.open("a.png") as image:
        assert image.size == (96, 64)
        assert json.loads(image.info["settings"])["upscale"]["temperature"] == 0.5
    assert run("upscale", picture, "--out", "b.png", *options)[1] == "b.png  (seed 3)\n"
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_picture_is_drawn_and_upscaled_by_one_command(run: Run, tiny_upscaler: Path) -> None:
    code, out, _ = run("red apple", "--upscale", "--seed", 3, "--n", 2, "--out", "new", "--json", "-m", tiny_upscaler)
    assert code == 0
    assert len(json.loads(out)["pictures"]) == 2
    pipe = MarsPipeline.from_pretrained(tiny_upscaler)
    wanted = pipe.upscale(pipe("red apple", seed=3, n=2))
    for index, image in enumerate(wanted.images):
        with Image.open(f"new/{index:04d}.png") as found:
            assert found.size == (96, 64)
            assert found.info == image.info


def test_one_bar_counts_drawing_and_upscaling(tiny_upscaler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_IMAGES", 2)
    told: list[tuple[int, int]] = []
    drawn = drawing.draw_all(
        MarsPipeline.from_pretrained(tiny_upscaler), list("abc"), n=1, seed=1, size=(None, None), negative="",
        sampling=Sampling(), upscale=True, progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert [len(one.images) for one in drawn] == [2, 1]
    once = [*range(1, 7), *range(10, 31, 4)]  # codes of a picture: six, then 24, four in a step
    assert told == [(done, 90) for done in [2 * done for done in once] + [60 + done for done in once]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["upscale", "PICTURE", "-m", "TINY"], "tiny was not trained to upscale"),
        (["a", "--upscale", "-m", "TINY"], "tiny was not trained to upscale"),
        (["a", "--upscale", "--width", 64, "-m", "UPSCALER"], "size must be one that the model was trained on"),
        (["upscale", "nothing.png", "-m", "UPSCALER"], "no picture at nothing.png"),
        (["upscale", "PICTURE", "-o", "a.gif", "-m", "UPSCALER"], "must end in .png"),
    ],
)
def test_what_cannot_be_upscaled_is_one_line_and_leaves_nothing(
    run: Run, tiny_model: Path, tiny_upscaler: Path, picture: Path, arguments: list[object], word: str
) -> None:
    places = {"PICTURE": picture, "TINY": tiny_model, "UPSCALER": tiny_upscaler}
    code, out, err = run(*(places.get(str(one), one) for one in arguments))
    assert code != 0
    assert out == ""
    assert err.startswith("mars: ")
    assert err.count("\n") == 1
    assert word in err
    assert list(Path.cwd().iterdir()) == []
