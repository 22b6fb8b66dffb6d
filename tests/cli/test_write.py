import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., tuple[int, str, str]]


def test_text_and_pictures_are_told_and_saved(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), "red").save("red.png")
    options = ["--picture", "red.png", "--max-tokens", 6, "--seed", 1, "--model", tiny_model]
    code, out, err = run("write", "a", "red", "apple", *options, "--json")
    assert (code, err) == (0, "")
    parts = json.loads(out)["parts"]
    for part in parts:
        if "file" in part:
            with Image.open(part["file"]) as image:
                assert image.size == (48, 32)
    code, out, _ = run("write", "a", "red", "apple", *options)
    assert code == 0
    assert out == "".join(part.get("text") or f"[{part['file']}]" for part in parts) + "\n"


def test_a_missing_picture_is_one_line(run: Run, tiny_model: Path) -> None:
    code, out, err = run("write", "a", "--picture", "none.png", "--model", tiny_model)
    assert (code, out, err) == (1, "", "mars: no picture at none.png\n")
