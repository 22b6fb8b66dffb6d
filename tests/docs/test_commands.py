"""Every command on the docs site: what can run here runs, in the order of its page; of all, the options exist.

A fence without a language or of `sh` holds commands. In docs/, those of a page run one after the other in one folder,
and so do its `python` fences, with the shipped model and small pictures; where a comment `not run: REASON` stands above
a fence, only its options are checked. Pages outside docs/ say the same things again and are only checked.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageDraw

from mars import cli
from mars.config import load_config
from mars.training.stages import StageConfig
from mars.training.tokenizer_trainer import TokenizerTrainingConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REPEATED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "integrations").glob("*/README.md"))]
COMMANDS = ("", "sh")
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
TOOLS = {".", "cat", "cp", "curl", "docker", "git", "printf"}
"""What else a page may call."""
SHELL = r"""
set -euo pipefail
server=
stop() { if [ -n "$server" ]; then kill -TERM "$server"; wait "$server"; server=; fi; }
trap 'if [ -n "$server" ]; then kill "$server"; fi' EXIT
mars() {
    if [ "$1" != serve ]; then command mars "$@"; return; fi
    stop
    command mars "$@" 2> serve.log & server=$!
    until curl -sf http://127.0.0.1:8000/ready > ready; do kill -0 "$server"; sleep 0.2; done
}
"""
"""A server runs beside what follows it on the page, until the next one or the end."""


@dataclass(frozen=True)
class Fence:
    page: Path
    language: str
    text: str
    reason: str | None
    """Why it is not run."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def fences(page: Path) -> list[Fence]:
    found = FENCE.finditer(page.read_text("utf-8"))
    return [Fence(page, match["language"], match["text"], match["reason"]) for match in found]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script as words; what they are connected by and redirected to is left out."""
    begun = ""
    for line in text.replace("\\\n", " ").splitlines():
        begun += line + "\n"
        lexer = shlex.shlex(begun, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            continue
        begun = ""
        words: list[str] = []
        redirected = False
        for token in [*tokens, ";"]:
            if set(token) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif token in ("<", ">", ">>"):
                redirected = True
            elif redirected:
                redirected = False
            else:
                words.append(token)


def parse(arguments: list[str]) -> None:
    """What `mars` itself does with its arguments, up to where a command would begin; an error of usage is raised."""
    command, rest = typer.main.get_command(cli.app), cli._with_default_command(arguments)
    while isinstance(command, typer.core.TyperGroup):
        assert rest, "a command must follow"
        assert rest[0] in command.commands, f"{rest[0]} is no command of {command.name}"
        command, rest = command.commands[rest[0]], rest[1:]
    values = command.make_context(command.name, list(rest)).params
    if command.name == "train" and (file := ROOT / values["config"]).is_file():
        stage = tomllib.loads(file.read_text("utf-8"))["stage"]
        load_config(TokenizerTrainingConfig if stage == "tokenizer" else StageConfig, file, values["overrides"] or [])


def check(words: list[str]) -> None:
    """That what a command names exists."""
    tool = words[0].rsplit("/", 1)[-1]
    if tool in ("python", "python3", "torchrun") and "-m" in words:
        tool, words = words[words.index("-m") + 1], words[words.index("-m") + 1 :]
        if tool.startswith("benchmarks."):
            assert (ROOT / tool.replace(".", "/")).with_suffix(".py").is_file()
            return
    if tool == "mars":
        parse(words[1:])
    elif tool == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif tool == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for asked in re.findall(r"mars-t2i\[([\w,]+)\]", " ".join(words)):
            assert set(asked.split(",")) <= extras.keys(), asked
    elif tool in ("python", "python3"):
        assert words[1] == "-c" or (ROOT / words[1]).is_file(), words
    else:
        assert tool in TOOLS | {"build", "pip", "twine", "venv"}, f"{tool} is not known here"


@pytest.mark.parametrize(
    "fence",
    [fence for page in PAGES + REPEATED for fence in fences(page) if fence.language in COMMANDS],
    ids=str,
)
def test_what_a_command_names_exists(fence: Fence) -> None:
    found = list(commands(fence.text))
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "text",
    [
        "mars generate x --sed 1",
        "mars data encod",
        "mars train configs/lora.toml --set lora.rnk=8",
        "mras x",
        "make dome",
    ],
)
def test_a_command_that_does_not_exist_is_seen(text: str) -> None:
    (words,) = commands(text)
    with pytest.raises(Exception, match=r"No such option|no command of|unknown key|not known here|dome"):
        check(words)


def _photo(path: Path, *, size: int, seed: int) -> None:
    """A disc of a random colour on another: no two alike."""
    values = np.random.default_rng(seed).integers(0, 256, (2, 3))
    image = Image.new("RGB", (size, size), tuple(map(int, values[0])))
    ImageDraw.Draw(image).ellipse((8 * seed, 9, size - 20, size - 7 * seed), tuple(map(int, values[1])))
    path.parent.mkdir(exist_ok=True)
    image.save(path)


def _photos(folder: Path, *, count: int = 12) -> None:
    for number in range(count):
        _photo(folder / "photos" / f"disc-{number}.png", size=160, seed=number)
        (folder / "photos" / f"disc-{number}.txt").write_text(f"a disc with the number {number}", "utf-8")


def _tables(folder: Path) -> None:
    """What docs/data.md ingests beside a folder: a table, and a tar as img2dataset writes it."""
    _photo(folder / "more" / "table.png", size=200, seed=13)
    row = {"image": "more/table.png", "text": "a disc in a table", "text_zh": "表格里的圆"}
    (folder / "list.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    _photo(folder / "more" / "000000.jpg", size=200, seed=14)
    (folder / "more" / "000000.txt").write_text("a disc in a tar", "utf-8")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as archive:
        for name in ("000000.jpg", "000000.txt"):
            archive.add(folder / "more" / name, arcname=name)


def _apple_and_mask(folder: Path) -> None:
    _photo(folder / "apple.png", size=128, seed=1)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 64, 128, 128))
    mask.save(folder / "mask.png")


GIVEN: dict[str, list[Callable[[Path], None]]] = {
    "data.md": [partial(_photos, count=3), _tables],
    "drawing.md": [_apple_and_mask],
    "own-pictures.md": [_photos],
    "serve.md": [_apple_and_mask],
}
"""What lies in the folder when a page's commands begin."""


def _script(page: Path) -> str:
    """The page as one shell script; empty if nothing on it is run."""
    parts = []
    for fence in fences(page):
        if fence.reason is None and fence.language in COMMANDS:
            parts.append(fence.text)
        elif fence.reason is None and fence.language == "python":
            parts.append(f"python3 - <<'END_OF_PYTHON'\n{fence.text}END_OF_PYTHON\n")
    return SHELL + "\n".join([*parts, "stop"]) if parts else ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if _script(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    for name in ("assets", "benchmarks", "configs", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    for give in GIVEN.get(page.name, []):
        give(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "mars").write_text(f'#!/bin/sh\nexec {sys.executable} -m mars "$@"\n', "utf-8")
    (programs / "mars").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    run = subprocess.run(
        [*_alone(), "bash", "-c", _script(page)], cwd=tmp_path, env=here, capture_output=True, text=True, check=False
    )
    log = tmp_path / "serve.log"
    served = log.read_text("utf-8")[-2000:] if log.is_file() else ""
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}\n{served}"


def _alone() -> list[str]:
    """A network of its own, where that can be had: nothing can be fetched, and port 8000 is free."""
    alone = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return alone
