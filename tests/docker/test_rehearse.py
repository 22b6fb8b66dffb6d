import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docker.rehearse import instructions
from mars.pipeline import MarsPipeline
from mars.server.settings import Settings
from tests.docs.test_commands import parse
from tests.server.conftest import running

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))

each = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def values(dockerfile: Path, name: str) -> list[str]:
    return [value for found, value in instructions(dockerfile) if found == name]


def test_there_is_one_for_the_cpu_and_one_for_cuda() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cuda"]


@each
def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@each
def test_it_runs_as_a_user_without_rights_whose_number_is_told(dockerfile: Path) -> None:
    last = [(name, value) for name, value in instructions(dockerfile) if name in ("FROM", "USER")][-1]
    assert last[0] == "USER"
    assert int(last[1]) >= 1000
    assert any(f"useradd --system --uid {last[1]} " in value for value in values(dockerfile, "RUN"))


@each
def test_what_it_copies_is_there_and_not_ignored(dockerfile: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    sources = [
        source
        for value in values(dockerfile, "COPY")
        if not value.startswith("--from=")
        for source in value.split()[:-1]
        if not source.startswith("--")
    ]
    assert "src" in sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept


@each
def test_versions_are_those_of_the_constraints(dockerfile: Path) -> None:
    bases = set(values(dockerfile, "FROM"))
    (version,) = {re.match(r"python:(\d+)\.(\d+)-", base).groups() for base in bases}  # type: ignore[union-attr]
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert asked["requires-python"] == ">={}.{}".format(*version)
    installs = re.findall(r"pip install (.*?)(?:&&|$)", " ".join(values(dockerfile, "RUN")))
    assert installs
    for install in installs:
        named = re.search(r"--no-deps -r (\S+)", install)
        if named is None:
            assert "-c constraints.txt" in install
        else:
            wanted = re.findall(r"^([^#\s]+)", (ROOT / named[1]).read_text("utf-8"), flags=re.MULTILINE)
            assert all("==" in one for one in wanted)
        for extra in ",".join(re.findall(r"\[([\w,]+)\]", install)).split(","):
            assert extra in {"", *asked["optional-dependencies"]}


@each
def test_what_it_starts_is_a_command_with_options_that_exist(dockerfile: Path) -> None:
    assert [json.loads(value) for value in values(dockerfile, "ENTRYPOINT")] == [["mars"]]
    (started,) = map(json.loads, values(dockerfile, "CMD"))
    if started != ["--help"]:
        parse(started)


def test_the_health_check_passes_where_the_server_answers_and_nowhere_else(tiny_model: Path) -> None:
    dockerfile = ROOT / "docker" / "Dockerfile"
    (value,) = values(dockerfile, "HEALTHCHECK")
    python, *words = json.loads(value.split(" CMD ", 1)[1])
    (started,) = map(json.loads, values(dockerfile, "CMD"))
    assert python == "python"
    assert f":{started[started.index('--port') + 1]}/health" in words[-1]

    def healthy(port: int) -> bool:
        asked = [word.replace(":8000/", f":{port}/") for word in words]
        return subprocess.run([sys.executable, *asked], capture_output=True, check=False).returncode == 0

    with running(MarsPipeline.from_pretrained(tiny_model), Settings()) as server:
        assert healthy(server.port)
    assert not healthy(server.port)
