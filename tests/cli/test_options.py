import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_info_of_rounded_weights_shows_fewer_bytes(run: Run, even_model: Path) -> None:
    held = {}
    for precision in ("fp32", "int8", "int4"):
        code, out, err = run("info", even_model, "--precision", precision, "--json")
        assert (code, err) == (0, "")
        held[precision] = json.loads(out)["bytes in memory"]
    assert held["fp32"] > held["int8"] > held["int4"]


def test_a_rounded_model_draws_the_same_bytes_twice(run: Run, even_model: Path) -> None:
    for name in ("a.png", "b.png"):
        command = ["x", "--seed", 1, "--precision", "int4", "--model", even_model, "--out", name]
        assert run(*command) == (0, f"{name}  (seed 1)\n", "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--precision", "int5"], "precision must be one of fp32, fp16, int8, int4, got 'int5'", 2),
        (["--model", "nobody/nothing"], "model nobody/nothing is neither in the hub's cache nor can it be", 1),
        (["--model", "nobody/nothing@v1"], "model nobody/nothing at v1 is neither in the hub's cache nor", 1),
        (["--model", "./nobody"], "no model at nobody; name a folder", 1),
        (["--model", "nobody@v1"], "a revision is for a model on the hub, got v1 for the folder nobody", 2),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_line(run: Run, options: list[str], words: str, code: int) -> None:
    found, out, err = run("x", *options)
    assert (found, out) == (code, "")
    assert err.startswith(f"mars: {words}")
    assert err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_folder_with_an_at_is_a_folder(run: Run, even_model: Path) -> None:
    shutil.copytree(even_model, "model@v1")
    assert run("x", "--seed", 1, "--model", "model@v1")[0] == 0


def test_a_revision_on_the_hub_is_opened_from_its_cache(
    run: Run, even_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, commit = tmp_path / "hf" / "models--someone--even", "0" * 40
    shutil.copytree(even_model, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    assert run("x", "--seed", 1, "--model", "someone/even@v1", "--out", "a.png")[0] == 0
    assert run("x", "--seed", 1, "--model", even_model, "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    found, _, err = run("x", "--model", "someone/even")  # main is not in the cache
    assert (found, err.count("\n")) == (1, 1)
