import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mars import cli
from mars.cli import data, drawing
from mars.data import scenes
from mars.data.shards import read_codes, read_pictures, write_pictures
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline, orders

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of one page (a tmpfs where we may mount one, else a system that refuses to finish files)."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    mounted = (
        os.geteuid() == 0
        and shutil.which("mount") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    if not mounted:

        def refuse(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", refuse)
        monkeypatch.setattr(Path, "replace", refuse)
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def one_line(ran: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """The run failed with one line that holds these words, and wrote nothing on standard output."""
    found, out, err = ran
    assert (found, out) == (code, "")
    assert err.startswith("mars: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def here() -> list[str]:
    return sorted(path.name for path in Path.cwd().rglob("*"))


# Drawing


def test_the_same_command_gives_the_same_bytes(run: Run, tiny_model: Path) -> None:
    for name in ("a.png", "b.png"):
        code, out, err = run("generate", "slice of pizza", "--seed", 1, "--out", name, "--model", tiny_model)
        assert (code, out, err) == (0, f"{name}  (seed 1)\n", "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with Image.open("a.png") as image:
        assert image.size == (48, 32)
        assert image.info["prompt"] == "slice of pizza"
        assert image.info["seed"] == "1"
    run("generate", "slice of pizza", "--seed", 2, "--out", "c.png", "--model", tiny_model)
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()


def test_words_alone_mean_generate(run: Run, tiny_model: Path) -> None:
    assert run("a red apple", "--seed", 1, "-m", tiny_model)[0] == 0
    assert run("generate", "a", "red", "apple", "--seed", 1, "-m", tiny_model, "-o", "b.png")[0] == 0
    assert Path("mars.png").read_bytes() == Path("b.png").read_bytes()


def test_a_picture_reports_itself_as_json(run: Run, tiny_model: Path) -> None:
    code, out, err = run("红苹果", "--n", 2, "--seed", 7, "--out", "pictures", "--json", "--model", tiny_model)
    assert (code, err) == (0, "")
    assert "红苹果" in out
    table = json.loads(out)
    assert table["pictures"] == [
        {"file": f"pictures/000{index}.png", "prompt": "红苹果", "seed": 7 + index} for index in range(2)
    ]
    assert table["seconds"].keys() == {"prompt_and_codes", "pixels", "total"}
    assert here() == ["0000.png", "0001.png", "pictures"]


@pytest.mark.parametrize("command", [["-"], ["generate", "-"]])
def test_prompts_come_from_standard_input_one_a_line(run: Run, tiny_model: Path, command: list[str]) -> None:
    said = "a red apple\n\n  披萨 \nc"
    code, out, _ = run(*command, "--out", "o", "--seed", 3, "--json", "--model", tiny_model, stdin=said)
    assert code == 0
    assert [one["prompt"] for one in json.loads(out)["pictures"]] == ["a red apple", "披萨", "c"]
    run("披萨", "--seed", 3, "--out", "alone.png", "--model", tiny_model)
    with Image.open("o/0001.png") as one, Image.open("alone.png") as other:
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
        assert one.info == other.info


@pytest.fixture
def two_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline takes two pictures in a call."""
    monkeypatch.setattr(orders, "MAX_IMAGES", 2)
    monkeypatch.setattr(drawing, "MAX_IMAGES", 2)


LINES = "a\nb\nc\nd\ne\n"


@pytest.mark.usefixtures("two_per_call")
@pytest.mark.parametrize(("seed", "n"), [(3, 1), (None, 1), (3, 2)])
def test_more_prompts_than_a_call_takes_are_drawn_in_several(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None, n: int
) -> None:
    options = ["--n", n, "--json", "--model", tiny_model, *([] if seed is None else ["--seed", seed])]
    code, out, err = run("-", "--out", "some", *options, stdin=LINES)
    assert (code, err, out.count("\n")) == (0, "", 1)
    some = json.loads(out)
    assert [one["file"] for one in some["pictures"]] == [f"some/{index:04d}.png" for index in range(5 * n)]
    assert [one["prompt"] for one in some["pictures"]] == [text for text in "abcde" for _ in range(n)]
    first = some["pictures"][0]["seed"]
    assert [one["seed"] for one in some["pictures"]] == [first + index for _ in range(5) for index in range(n)]
    assert some["seconds"]["total"] == pytest.approx(some["seconds"]["prompt_and_codes"] + some["seconds"]["pixels"])
    monkeypatch.setattr(orders, "MAX_IMAGES", 5 * n)
    drawn = MarsPipeline.from_pretrained(tiny_model)(list("abcde"), n=n, seed=first)
    for index, wanted in enumerate(drawn.images):
        with Image.open(f"some/{index:04d}.png") as found:
            assert found.info == wanted.info
            assert np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1


@pytest.mark.usefixtures("two_per_call")
def test_pictures_are_on_the_disk_after_each_call(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    call = MarsPipeline.__call__

    def watched(self: MarsPipeline, *arguments: Any, **named: Any) -> Any:
        seen.append(sorted(path.name for path in Path.cwd().rglob("*.png")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return call(self, *arguments, **named)

    monkeypatch.setattr(MarsPipeline, "__call__", watched)
    code, out, err = run("-", "--seed", 1, "-o", "a.png", "--model", tiny_model, stdin=LINES)
    assert (code, err) == (130, "mars: interrupted\n")
    names = [f"a-{index:04d}.png" for index in range(4)]
    assert seen == [[], names[:2], names]
    assert out == "".join(f"{name}  (seed 1)\n" for name in names)


@pytest.mark.usefixtures("two_per_call")
@pytest.mark.parametrize(("said", "word"), [(LINES + "x" * 600, "at most 512 tokens")])
def test_a_prompt_of_a_later_call_is_refused_before_the_first(run: Run, tiny_model: Path, said: str, word: str) -> None:
    one_line(run("-", "--out", "new", "--model", tiny_model, stdin=said), word)
    assert here() == []


def test_one_bar_counts_the_steps_of_all_calls(pipe: MarsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_IMAGES", 2)
    told: list[tuple[int, int]] = []
    drawn = drawing.draw_all(
        pipe, list("abc"), n=1, seed=1, size=(None, None), negative="", sampling=Sampling(candidates=2),
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert [len(one.images) for one in drawn] == [2, 1]
    assert told == [(done, 36) for done in (*range(4, 25, 4), *range(26, 37, 2))]


def test_options_before_the_words_mean_generate_too(run: Run, tiny_model: Path) -> None:
    assert run("--seed", 1, "-m", tiny_model, "a red apple")[0] == 0
    assert run("generate", "a red apple", "--seed", 1, "-m", tiny_model, "-o", "b.png")[0] == 0
    assert Path("mars.png").read_bytes() == Path("b.png").read_bytes()
    code, out, _ = run("--help")
    assert code == 0
    assert "caption" in out


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("a.png", ["a-0000.png", "a-0001.png"]),
        ("a.jpg", ["a-0000.jpg", "a-0001.jpg"]),
        ("new/a.webp", ["a-0000.webp", "a-0001.webp", "new"]),
        ("new", ["0000.png", "0001.png", "new"]),
    ],
)
def test_several_pictures_are_numbered(run: Run, tiny_model: Path, out: str, names: list[str]) -> None:
    assert run("x", "--n", 2, "--out", out, "--model", tiny_model)[0] == 0
    assert here() == names
    for path in Path.cwd().rglob("*.*"):
        with Image.open(path) as image:
            assert image.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix]


def test_settings_of_the_command_reach_the_picture(run: Run, tiny_model: Path) -> None:
    options = ["--guidance", 2.5, "--temperature", 0.5, "--top-k", 9, "--top-p", 0.8, "--negative", "蓝", "--seed", 0]
    options += ["--candidates", 2, "--guidance-stop", 0.25, "--window", 3]
    assert run("x", *options, "--width", 48, "--height", 32, "--model", tiny_model)[0] == 0
    with Image.open("mars.png") as image:
        settings = json.loads(image.info["settings"])
    wanted = {
        "guidance": 2.5, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "candidates": 2, "negative_prompt": "蓝",
        "guidance_stop": 0.25, "window": 3,
    }  # fmt: skip
    assert settings == wanted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", ""], ["the prompt must not be empty"]),
        (["  "], ["the prompt must not be empty"]),
        ([""], ["must not be empty"]),
        (["-"], ["standard input must hold a prompt per line, got none"]),
        (["x" * 600], ["at most 512 tokens", "got 601"]),
        (["x" * 200], ["192 positions", "shorten the prompt"]),
        (["x", "--width", "100"], ["width must be a multiple of 16, got 100"]),
        (["x", "--height", "40"], ["height must be a multiple of 16, got 40"]),
        (["x", "--width", "64", "--height", "64"], ["trained on (48x32)", "got 64x64"]),
        (["x", "--n", "0"], ["got n = 0"]),
        (["x", "--n", "-1"], ["got n = -1"]),
        (["x", "--n", "10000"], ["got n = 10000"]),
        (["x", "--seed", "-1"], ["seed must lie in"]),
        (["x", "--temperature", "-1"], ["temperature must be at least 0"]),
        (["x", "--top-p", "0"], ["top_p must lie"]),
        (["x", "--guidance", "nan"], ["guidance must lie"]),
        (["x", "--out", "a.gif"], ["must end in .png, .jpg or .webp", "a.gif"]),
    ],
    ids=lambda value: " ".join(value)[:32],
)
def test_a_bad_request_is_one_line_and_leaves_nothing(
    run: Run, tiny_model: Path, arguments: list[str], words: list[str]
) -> None:
    one_line(run(*arguments, "--model", tiny_model), *words)
    assert here() == []


def test_no_such_model_is_one_line(run: Run, tmp_path: Path) -> None:
    one_line(run("x", "--model", tmp_path / "none"), "no model at", code=1)
    (tmp_path / "empty").mkdir()
    one_line(run("info", tmp_path / "empty"), "no config.json in", code=1)
    assert here() == []


def test_a_picture_that_cannot_be_written_is_one_line(run: Run, tiny_model: Path, full_disk: Path) -> None:
    (full_disk / "filler").write_bytes(bytes(4096))
    found = run("x", "--out", full_disk / "a.png", "--model", tiny_model)
    one_line(found, "cannot write", "the disk is full")
    found = run("x", "--n", 2, "--out", full_disk / "new", "--model", tiny_model)
    one_line(found, "cannot write")
    assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["filler"]
    Path("file").write_bytes(b"")
    one_line(run("x", "--out", "file/a.png", "--model", tiny_model), "cannot write file/a.png")
    assert here() == ["file"]


def test_an_old_picture_survives_a_full_disk(run: Run, tiny_model: Path, full_disk: Path) -> None:
    (full_disk / "a.png").write_bytes(bytes(4000))
    one_line(run("x", "--out", full_disk / "a.png", "--model", tiny_model), "cannot write")
    assert [(path.name, path.read_bytes()) for path in full_disk.iterdir()] == [("a.png", bytes(4000))]


# Damaged models


def _edit(model: Path, change: str) -> None:
    path = model / "visual.safetensors"
    tensors = load_file(path)
    name = "layers.2.visual.q_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["layers.1.visual.q_proj.weight"] = tensors[name].clone()
    elif change == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif change == "nan":
        tensors[name][3, 4] = torch.nan
    elif change == "infinity":
        tensors[name][3, 4] = torch.inf
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("missing", "missing layers.2.visual.q_proj.weight"),
        ("extra", "unknown layers.1.visual.q_proj.weight"),
        ("shape", "layers.2.visual.q_proj.weight must be [32, 24], got [31, 24]"),
        ("nan", "layers.2.visual.q_proj.weight holds NaN or infinity"),
        ("infinity", "holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_one_line(run: Run, model: Path, change: str, word: str) -> None:
    _edit(model, change)
    one_line(run("x", "--model", model), "visual.safetensors", word, code=1)
    assert here() == []


@pytest.mark.parametrize(
    "name", ["visual.safetensors", "image_tokenizer.safetensors", "config.json", "image_tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied", "replaced"])
def test_a_damaged_file_is_one_line(run: Run, model: Path, name: str, damage: str) -> None:
    content = (model / name).read_bytes()
    (model / name).unlink()
    if damage != "removed":
        new = {"truncated": content[: len(content) // 2], "emptied": b"", "replaced": b"\x80\x04pickled" * 50}
        (model / name).write_bytes(new[damage])
    one_line(run("x", "--model", model), name.split(".")[0], code=1)
    assert here() == []


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("format", "mars-9", "must be of format 'mars-1'"),
        ("model", None, "and name a model"),
        ("gridz", [[2, 3]], "unknown key gridz; did you mean grids"),
        ("grids", "2x3", "grids must be"),
        ("grids", [], "grids must hold at least one"),
        ("grids", [[0, 3]], "grids must hold at least one"),
        ("language_digest", "sha256:00", "was trained on the LLM sha256:00"),
        ("name", 3, "name must be str"),
    ],
)
def test_a_wrong_description_is_one_line(run: Run, model: Path, key: str, value: object, word: str) -> None:
    table = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(table | {key: value}), "utf-8")
    one_line(run("x", "--model", model), word, code=1)


# Captions, chat and information


def test_a_caption_is_text_or_json(run: Run, tiny_model: Path) -> None:
    run("x", "--seed", 0, "--model", tiny_model)
    code, text, _ = run("caption", "mars.png", "--model", tiny_model)
    assert code == 0
    code, out, _ = run("caption", "mars.png", "--json", "--model", tiny_model)
    assert json.loads(out) == {"file": "mars.png", "caption": text.removesuffix("\n")}
    assert run("caption", "mars.png", "--lang", "zh", "--model", tiny_model)[0] == 0
    one_line(run("caption", "mars.png", "--lang", "fr", "--model", tiny_model), "one of en, zh, got 'fr'")


def test_a_file_that_is_no_picture_is_one_line(run: Run, tiny_model: Path) -> None:
    Image.new("RGB", (1, 1)).save("small.png")
    Image.new("RGB", (20, 20)).save("a.gif")
    Path("a.txt").write_text("hello", "utf-8")
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:500])
    cases = {
        "small.png": "got 1x1",
        "a.gif": "got GIF",
        "a.txt": "not a picture",
        "cut.png": "damaged",
        "no.png": "no picture",
    }
    for name, word in cases.items():
        one_line(run("caption", name, "--model", tiny_model), name, word, code=1)


def test_chat_prints_the_answer(run: Run, tiny_model: Path) -> None:
    code, out, _ = run("chat", "hello", "there", "--max-tokens", 9, "--json", "--model", tiny_model)
    assert code == 0
    table = json.loads(out)
    assert table["text"] == "hello there"
    code, out, err = run("chat", "-", "--max-tokens", 9, "--model", tiny_model, stdin="hello there")
    assert (code, err) == (0, "")
    assert table["answer"].startswith(out.removesuffix("\n"))
    one_line(run("chat", " ", "--model", tiny_model), "must not be empty")
    one_line(run("chat", "x" * 300, "--model", tiny_model), "must be shorter than 192 tokens")


def test_info_shows_that_the_language_model_is_unchanged(run: Run, tiny_model: Path) -> None:
    code, out, _ = run("info", tiny_model, "--json")
    table = json.loads(out)
    assert (code, table["name"]) == (0, "tiny")
    assert table["language digest"] == table["language digest of the LLM"]
    code, out, _ = run("info", tiny_model)
    assert f"{table['language expert parameters']:,}" in out
    assert len(out.splitlines()) == len(table)


# Picture sets


def test_scenes_become_pictures_and_then_codes(run: Run, model: Path) -> None:
    code, out, _ = run("data", "scenes", "--out", "s.tar", "--count", 5, "--size", 64)
    assert (code, out) == (0, "s.tar: 5 pictures\n")
    assert len(list(read_pictures(Path("s.tar")))) == 5
    code, out, _ = run("data", "encode", "s.tar", "--image-tokenizer", model, "--out", "s.parquet")
    assert (code, out) == (0, "s.parquet: 5 pictures\n")
    assert read_codes(Path("s.parquet"))[0][0].codes.shape == (4, 4)
    one_line(
        run("data", "encode", "no.tar", "--image-tokenizer", model, "--out", "n.parquet"), "no picture shard", code=1
    )
    one_line(
        run("data", "encode", "s.tar", "--image-tokenizer", "none", "--out", "n.parquet"), "image_tokenizer", code=1
    )
    assert here() == ["s.parquet", "s.tar"]


def test_one_file_may_hold_several_sizes(run: Run, model: Path, tiny_pictures: Path) -> None:
    sizes = ("--size", 16, "--size", 32, "--crop", "none")
    code, out, _ = run("data", "encode", tiny_pictures, "--image-tokenizer", model, "--out", "s.parquet", *sizes)
    assert (code, out) == (0, "s.parquet: 32 pictures\n")
    assert {item.codes.shape for item in read_codes(Path("s.parquet"))[0]} == {(1, 1), (2, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "codes", "--engine", "spark"), "engine must be local or ray, got spark"),
        (("--out", "codes", "--size", 100), "size must be a multiple of 16, got 100; near are 96 and 112"),
        (("--out", "codes", "--size", 32, "--crop", "left"), "crop must be center, random, none"),
        (("--out", "codes", "--aspect-buckets"), "give --size"),
        (("--out", "codes.parquet", "--workers", 2), "one file is written by one process"),
    ],
)
def test_what_cannot_be_encoded_so_is_one_line(
    run: Run, model: Path, tiny_pictures: Path, options: tuple[object, ...], message: str
) -> None:
    one_line(run("data", "encode", tiny_pictures, "--image-tokenizer", model, *options), message, code=2)
    assert here() == []


@pytest.mark.slow
def test_a_set_is_encoded_into_a_folder_and_what_is_damaged_listed(run: Run, model: Path, tiny_pictures: Path) -> None:
    pictures = list(read_pictures(tiny_pictures))
    pictures[3] = replace(pictures[3], content=pictures[3].content[:50])
    write_pictures(Path("in.tar"), pictures)
    arguments = ("data", "encode", "in.tar", "--image-tokenizer", model, "--out", "codes", "--size", 32)
    for _ in range(2):  # the second finds everything done
        code, out, _ = run(*arguments)
        assert (code, out) == (0, "codes: 31 pictures\n  refused: 1, listed in codes/quarantine.jsonl\n")
    assert len(read_codes(Path("codes/32/in.parquet"))[0]) == 31
    one_line(run(*arguments, "--crop", "random"), "codes was made with crop", code=1)


def test_encoding_moves_a_bar(run: Run, model: Path, tiny_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, int, int]] = []

    @contextmanager
    def bar(what: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: moved.append((what, done, total))

    monkeypatch.setattr(data, "bar", bar)
    assert run("data", "encode", tiny_pictures, "--image-tokenizer", model, "--out", "s.parquet")[0] == 0
    assert moved == [("encoding", 32, 32)]


@pytest.mark.parametrize("command", ["scenes", "encode"])
def test_a_set_that_does_not_fit_on_the_disk_is_one_line(
    run: Run, model: Path, full_disk: Path, tiny_pictures: Path, command: str
) -> None:
    if command == "scenes":
        found = run("data", "scenes", "--out", full_disk / "s.tar", "--count", 20)
    else:
        (full_disk / "filler").write_bytes(bytes(4096))
        found = run("data", "encode", tiny_pictures, "--image-tokenizer", model, "--out", full_disk / "s.parquet")
    one_line(found, "disk is full", code=1)
    assert {path.name for path in full_disk.iterdir()} <= {"filler"}


# The program


def program(*arguments: str, stdin: bytes = b"", cwd: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from mars.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    return subprocess.run(command, input=stdin, capture_output=True, check=False, cwd=cwd, env=environment)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['mars', '--help']\n"
        "from mars.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'PIL', 'safetensors', 'tokenizers'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == "[]\n"
    for command in ("generate", "caption", "chat", "train", "data", "info"):
        assert command in done.stdout


def test_the_program_exits_with_one_line(tmp_path: Path) -> None:
    done = program("x", "--model", "none", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert (
        done.stderr.decode() == "mars: no model at none; name a folder that holds config.json and visual.safetensors\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    done = program("x", "--model", "none", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"ModelError: no model at none" in done.stderr


def test_standard_input_that_is_no_text_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    done = program("-", "--model", str(tiny_model), stdin=b"\xff\xfe\n", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_an_interruption_is_one_line(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_pipeline", interrupted)
    assert run("x", "--model", tiny_model) == (130, "", "mars: interrupted\n")
    assert here() == []
    monkeypatch.setattr(scenes, "make_scenes", interrupted)
    assert run("data", "scenes", "--out", "s.tar") == (130, "", "mars: interrupted\n")  # a command of a group


def test_a_package_that_is_not_installed_is_one_line(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(cli, "open_pipeline", lambda *_, **__: __import__("pyarrow"))
    one_line(run("x", "--model", tiny_model), "needs the package pyarrow", "pip install", code=1)


def test_an_unknown_option_is_a_usage_error(run: Run) -> None:
    one_line(run("x", "--colour", "red"), "--colour", "mars generate --help", code=2)


def test_an_argument_of_the_wrong_kind_or_missing_is_one_line(run: Run) -> None:
    one_line(run("generate", "x", "--n", "many"), "--n", "integer", code=2)
    one_line(run("generate"), "prompt", code=2)
    one_line(run("data", "paint"), "paint", code=2)
    one_line(run("data", "scenes", "--count", "0"), "--count", code=2)
