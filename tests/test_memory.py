import subprocess
import sys
from pathlib import Path

import pytest

from mars import memory
from mars.errors import ModelError
from mars.memory import available_memory, check_memory

MEMINFO = "MemTotal:    24000000 kB\nMemFree:      1000000 kB\nMemAvailable: 3000000 kB\n\nHugePages_Total: 0\n"


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    monkeypatch.setattr(memory, "MEMINFO", path)
    return path


def test_too_little_memory_is_one_line_with_both_numbers(meminfo: Path) -> None:
    check_memory(3_072_000_000, what="tiny")
    with pytest.raises(ModelError, match=r"^tiny needs 3.2 GB of memory, 3.1 GB are free; close other programs") as one:
        check_memory(3_200_000_000, what="tiny")
    assert "\n" not in str(one.value)
    with pytest.raises(ModelError, match="are free; choose a smaller one$"):
        check_memory(10**12, what="tiny", advice="choose a smaller one")


@pytest.mark.parametrize("content", [None, b"", b"MemTotal: 3 kB\n", b"MemAvailable:\n", b"\xff\xfe"])
def test_a_system_that_does_not_say_lets_everything_pass(meminfo: Path, content: bytes | None) -> None:
    meminfo.unlink()
    if content is not None:
        meminfo.write_bytes(content)
    assert available_memory() is None
    check_memory(10**18, what="anything")


def test_memory_that_was_freed_is_given_back() -> None:
    script = """
import resource
from pathlib import Path
from mars.memory import give_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
held = [bytearray(60_000) for _ in range(2000)]
kept = [bytearray(60_000) for _ in range(2)]  # above them, so that the heap's end cannot be cut off
full = resident()
del held
give_back()
print(full - resident())
"""
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 100_000_000


def test_large_blocks_go_back_at_once() -> None:
    script = """
import resource
from pathlib import Path
from mars.memory import keep_little
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
keep_little()
for _ in range(3):  # a block that was freed is what glibc would learn from
    held = bytearray(20_000_000)
    above = bytearray(60_000)
    full = resident()
    del held
print(full - resident())
"""
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 19_000_000
