"""Options of `mars generate` and `mars edit` that say how pictures are drawn and chosen."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., tuple[int, str, str]]

CHOOSE_LAST = "def last(prompt, images):\n    return range(len(images))\n\ndef few(prompt, images):\n    return [1]\n"


@pytest.fixture
def draw(run: Run, tiny_model: Path) -> Callable[..., dict[str, Any]]:
    """Draws a picture; what it says about itself, and its pixels."""

    def drawn(*options: object) -> dict[str, Any]:
        code, _, err = run("generate", "a red apple", "--seed", 2, "--out", "a.png", "--model", tiny_model, *options)
        assert (code, err) == (0, "")
        with Image.open("a.png") as image:
            info: dict[str, Any] = {str(name): value for name, value in image.info.items()}
            return info | {"settings": json.loads(info["settings"]), "pixels": image.tobytes()}

    return drawn


def test_a_window_draws_the_same_likeliest_picture_in_fewer_steps(draw: Callable[..., dict[str, Any]]) -> None:
    one, wide = (draw("--temperature", 0, "--candidates", 1, "--window", window) for window in (1, 6))
    assert one["pixels"] == wide["pixels"]
    assert (one["steps"], one["settings"]["window"]) == ("6", 1)
    assert (int(wide["steps"]) <= 6, wide["settings"]["window"]) == (True, 6)
    assert int(draw("--temperature", 0.01, "--candidates", 1, "--window", 6, "--guidance", 1)["steps"]) < 6


def test_guidance_stops_where_it_is_told_to(draw: Callable[..., dict[str, Any]]) -> None:
    hot = ("--temperature", 1.5, "--guidance", 4)
    whole, none, part = (draw(*hot, "--guidance-stop", stop) for stop in (1, 0, 0.5))
    assert whole["pixels"] == draw(*hot)["pixels"]
    assert none["pixels"] == draw("--temperature", 1.5, "--guidance", 1)["pixels"]
    assert part["settings"]["guidance_stop"] == 0.5
    assert len({one["pixels"] for one in (whole, none, part)}) == 3


def test_a_scorer_chooses(draw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("scorer_of_a_command.py").write_text(CHOOSE_LAST, "utf-8")
    hot = ("--temperature", 1.5, "--candidates", 3)
    assert draw(*hot, "--scorer", "likelihood") == draw(*hot)
    last = draw(*hot, "--scorer", "scorer_of_a_command:last")
    assert last["settings"]["scorer"] == "scorer_of_a_command:last"
    assert draw(*hot, "--scorer", "caption")["settings"]["scorer"] == "caption"
    assert last["pixels"] != draw(*hot)["pixels"]


@pytest.mark.parametrize("command", ["generate", "edit"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", 65], "window must lie in 1..64"),
        (["--guidance-stop", 1.5], "guidance_stop must lie in 0..1"),
        (["--scorer", "likely"], "the scorer must be likelihood, caption, or package.module:name of a callable"),
        (["--scorer", "caption", "--candidates", 1], "a scorer chooses among candidates, and there is 1"),
        (["--scorer", "scorer_of_a_command:few"], "few must give a number for each of 4 pictures, got 1: 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[object], words: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("scorer_of_a_command.py").write_text(CHOOSE_LAST, "utf-8")
    Image.new("RGB", (48, 32), "red").save("old.png")
    what = ["old.png", "a", "--vary", 0.9] if command == "edit" else ["a"]
    code, out, err = run(command, *what, *options, "--out", "a.png", "--model", tiny_model)
    assert (code, out) == (2, "")
    assert err.startswith("mars: ")
    assert words in err
    assert err.count("\n") == 1
    assert not Path("a.png").exists()
