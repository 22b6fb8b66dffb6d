import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mars.model.kernel import find_kernel


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MARS_CACHE", str(tmp_path))
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_it_is_compiled_once_and_found_again(tmp_path: Path) -> None:
    if find_kernel() is None:
        pytest.skip("a processor without AVX2")
    files = list((tmp_path / "kernels").iterdir())
    assert [path.suffix for path in files] == [".so"]
    made = files[0].stat().st_mtime_ns
    find_kernel.cache_clear()
    assert find_kernel() is not None
    assert files[0].stat().st_mtime_ns == made


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_kernel() is None


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    assert find_kernel() is None
    assert list(tmp_path.rglob("*.*")) == []
    find_kernel.cache_clear()
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    assert find_kernel() is None


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MARS_CACHE", str(tmp_path / "file"))
    assert find_kernel() is None


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_KERNEL", "off")
    assert find_kernel() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    ["cc -mno-avx512f", "cc -mno-amx-int8", "cc -DTILE_DATA=63"],
    ids=["no AVX-512", "no AMX", "AMX that the system refuses"],
)
def test_a_lesser_processor_draws_the_same(compiler: str) -> None:
    """The tests of the kernel, compiled for such a one."""
    if find_kernel() is None:
        pytest.skip("no C compiler, or a processor without AVX2")
    tests = [str(Path(__file__).with_name(name)) for name in ("test_decoding.py", "test_quantized.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
        env=os.environ | {"CC": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
