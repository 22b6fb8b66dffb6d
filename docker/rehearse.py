"""Runs the steps of a Dockerfile where there is no container engine: in copies of a clean Debian, by chroot, as root.

    debootstrap --variant=minbase --include=python3,python3-venv,python-is-python3,ca-certificates bookworm debian
    python docker/rehearse.py docker/Dockerfile --base debian --work rehearsal

Each stage begins with a copy of the base, whatever its FROM says. Then what the image would run is run by its user: the
health check must pass, a picture must come, and SIGTERM must end it with 0. `--from-host PATH` copies what this
machine's network asks for, such as certificates, into the base first; PIP_ variables are handed on to RUN.
"""

import argparse
import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8000"
SECONDS = 300
MOUNTS = 'mount -t proc proc "$0/proc"; mount --rbind /sys "$0/sys"; mount --rbind /dev "$0/dev"; exec "$@"'
"""What every engine mounts, for the one command only."""


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """The name and the value of each instruction; an option of HEALTHCHECK is part of the value."""
    lines = [line for line in dockerfile.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = line.partition(" ")
        yield name, " ".join(value.split())


@dataclass
class Stage:
    """A stage as far as it is built."""

    root: Path
    directory: str = "/"
    user: str = "0"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"})
    arguments: dict[str, str] = field(default_factory=dict)
    """Of ARG: seen by RUN and by nothing that runs later."""

    def command(self, words: list[str], **variables: str) -> list[str]:
        """What runs some words in this stage, as its user, in its directory."""
        told = [f"{name}={value}" for name, value in {**self.variables, **variables}.items()]
        mounted = ["unshare", "--mount", "sh", "-ec", MOUNTS, str(self.root)]
        inside = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "/usr/bin/env", "-i", *told]
        return [*mounted, *inside, "sh", "-c", 'cd "$0" && exec "$@"', self.directory, *words]

    def inside(self, path: str) -> Path:
        """Where a path of the stage is on this machine."""
        return self.root / os.path.join(self.directory, path).lstrip("/")  # noqa: PTH118 - an absolute path wins


def build(dockerfile: Path, *, base: Path, work: Path) -> tuple[Stage, dict[str, list[str]]]:
    """Runs every instruction. Returns the last stage, and the words of ENTRYPOINT, CMD and HEALTHCHECK."""
    stages: dict[str, Stage] = {}
    words: dict[str, list[str]] = {}
    for name, value in instructions(dockerfile):
        print(f"{name} {value}", flush=True)  # noqa: T201
        if name == "FROM":
            called = value.split(" AS ")[1] if " AS " in value else "final"
            subprocess.run(["cp", "-a", base, work / called], check=True)
            stage = stages[called] = Stage(work / called)
            continue
        if name == "RUN":
            asked = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            subprocess.run(stage.command(["sh", "-ec", value], **stage.arguments, **asked), check=True)
        elif name == "COPY":
            _copy(value, stage, stages)
        elif name == "WORKDIR":
            stage.directory = value
            stage.inside(".").mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = value
        elif name in ("ARG", "ENV"):
            into = stage.arguments if name == "ARG" else stage.variables
            for pair in shlex.split(value):
                key, _, text = pair.partition("=")
                into[key] = text.replace("$PATH", stage.variables["PATH"])
        elif name in ("ENTRYPOINT", "CMD"):
            words[name] = json.loads(value)
        elif name == "HEALTHCHECK":
            words[name] = json.loads(value.split(" CMD ", 1)[1])
    return stage, words


def _copy(value: str, stage: Stage, stages: dict[str, Stage]) -> None:
    *sources, target = [word for word in value.split() if not word.startswith("--")]
    origin = CONTEXT
    if value.startswith("--from="):
        origin = stages[value.split()[0].removeprefix("--from=")].root
    into = stage.inside(target)
    for source in sources:
        found = origin / source.lstrip("/")
        if found.is_dir():
            shutil.copytree(found, into, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy(found, into / found.name if target.endswith("/") else into)


def try_server(stage: Stage, words: dict[str, list[str]]) -> Path:
    """Starts what the image starts, and ends it when its health check has passed and a picture has come."""
    picture = stage.root / "picture.png"
    with subprocess.Popen(stage.command([*words["ENTRYPOINT"], *words["CMD"]])) as server:
        try:
            for _ in range(SECONDS):
                if (
                    subprocess.run(stage.command(words["HEALTHCHECK"]), capture_output=True, check=False).returncode
                    == 0
                ):
                    break
                if server.poll() is not None:
                    sys.exit(f"it ended with {server.returncode} before its health check passed")
                time.sleep(1)
            else:
                sys.exit(f"the health check did not pass within {SECONDS} s")
            body = json.dumps({"prompt": "pizza", "seed": 1}).encode()
            asked = urllib.request.Request(
                f"{ADDRESS}/v1/images/generations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
                picture.write_bytes(base64.b64decode(json.load(answer)["data"][0]["b64_json"]))
            server.terminate()
            if code := server.wait(SECONDS):
                sys.exit(f"SIGTERM must end it with 0, got {code}")
        finally:
            server.kill()
    return picture


def main() -> None:
    """Builds, tries a server, and says where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="a clean Debian with Python")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the stages")
    parser.add_argument("--from-host", type=Path, action="append", default=[], metavar="PATH")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True)
    for path in asked.from_host:
        inside = asked.base / path.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-aLT", path, inside], check=True)
    stage, words = build(asked.dockerfile, base=asked.base, work=asked.work)
    if words["CMD"][0] == "serve":
        print(f"everything ran; the picture is {try_server(stage, words)}")  # noqa: T201
    else:
        subprocess.run(stage.command([*words["ENTRYPOINT"], *words["CMD"]]), check=True)
        print("everything ran, and what it starts began; its health check needs a GPU")  # noqa: T201


if __name__ == "__main__":
    main()
