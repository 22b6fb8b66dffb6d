"""What `pip install` gets: the wheel, the source archive, and the commands of the wheel. Slow: it builds them."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000
SERVE = """
ip link set lo up
mars serve --port 8000 2> serve.log &
curl --silent --show-error --fail --retry 60 --retry-connrefused --retry-delay 1 --output /dev/null 127.0.0.1:8000/ready
curl --silent --show-error --fail --header 'Content-Type: application/json' --data '{"prompt": "pizza", "seed": 1}' \
    127.0.0.1:8000/v1/images/generations | python -c 'import base64, json, sys
open("served.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'
kill -TERM $!
wait $!
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment that has the wheel, and borrows what the wheel needs from this one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return python.parent


def _cut_off(command: list[str], *, installed: Path, cwd: Path) -> None:
    """Runs a command that can reach no network, where this machine lets us take it away."""
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the network cannot be cut off here")
    here = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    here["PATH"] = os.pathsep.join([str(installed), here["PATH"]])
    subprocess.run([*alone, *command], cwd=cwd, env=here, check=True)


def test_both_archives_are_what_an_index_takes(built: Path) -> None:
    files = sorted(built.iterdir())
    assert [file.name.rsplit("-")[0] for file in files] == ["mars_t2i", "mars_t2i"]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True, stdout=subprocess.DEVNULL)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        str(file.relative_to(source))
        for file in (source / "mars").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    beside = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - beside == expected
    assert {name.rsplit("/", 1)[1] for name in beside} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE", "NOTICE"
    }  # fmt: skip
    assert {"mars/py.typed", "mars/model/decode.c", "mars/model/quantized.c"} <= names
    assert wheel.stat().st_size < 60 * MEGABYTE


def test_the_source_archive_holds_what_the_wheel_is_made_of(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        top = {member.name.split("/")[1] for member in opened.getmembers()}
    assert top - {".gitignore"} == {
        "src", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "PKG-INFO"
    }  # fmt: skip


def test_it_draws_without_a_network_what_the_sources_draw(installed: Path, tmp_path: Path) -> None:
    where = "import mars; print(mars.__file__)"
    found = subprocess.run(
        [installed / "python", "-c", where], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(installed.parent)
    options = ["pizza", "--seed", "1", "--out"]
    _cut_off(["mars", "generate", *options, "installed.png"], installed=installed, cwd=tmp_path)
    code = "from mars.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "generate", *options, "source.png"], cwd=tmp_path, check=True)
    first, second = (hashlib.sha256((tmp_path / name).read_bytes()) for name in ("installed.png", "source.png"))
    assert first.hexdigest() == second.hexdigest()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("ip")), reason="needs curl and ip")
def test_it_serves_a_picture_without_a_network(installed: Path, tmp_path: Path) -> None:
    _cut_off(["sh", "-ec", SERVE], installed=installed, cwd=tmp_path)
    with Image.open(tmp_path / "served.png") as image:
        assert image.size == (128, 128)
        assert image.info["prompt"] == "pizza"
    assert '"serving"' in (tmp_path / "serve.log").read_text("utf-8")
