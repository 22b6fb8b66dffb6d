import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mars.pipeline import MarsPipeline

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(pipe: MarsPipeline, tmp_path: Path) -> Path:
    pipe("a red apple", seed=1).images[0].save(tmp_path / "old.png")
    hole = Image.new("L", (48, 32))
    hole.paste(255, (0, 0, 16, 16))
    hole.save(tmp_path / "mask.png")
    return tmp_path / "old.png"


@pytest.mark.parametrize(
    "how", [["--mask", "mask.png"], ["--margins", "16,0,16,0"], ["--margins", "8"], ["--vary", 0.4]]
)
def test_part_of_a_picture_is_drawn_anew(
    run: Run, tiny_model: Path, picture: Path, how: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*how, "--seed", 3, "--n", 2, "--model", tiny_model]
    code, out, err = run("edit", picture, "红苹果", "--out", "new", "--json", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["pictures"] == [{"file": f"new/{i:04d}.png", "seed": 3 + i} for i in range(2)]
    with Image.open("new/0001.png") as image:
        assert image.size == (48, 32)
        assert image.info["prompt"] == "红苹果"
        assert "edit" in json.loads(image.info["settings"])


def test_what_cannot_be_edited_is_one_line(run: Run, tiny_model: Path, picture: Path) -> None:
    for options, words in (([], "an edit needs"), (["--margins", "a"], "margins must be a number of pixels, or four")):
        code, out, err = run("edit", picture, *options, "--model", tiny_model)
        assert (code, out) == (2, "")
        assert err.startswith(f"mars: {words}")
        assert err.count("\n") == 1
