import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mars.data.workers import WorkerDied, in_order


def square(number: int) -> int:
    """Kills its process for 13, and fails for negative numbers."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise ValueError("negative")
    time.sleep(0.002 * (number % 3))
    return number * number


def test_without_workers_the_work_is_done_here() -> None:
    assert list(in_order(square, [3, 1, 2], workers=0)) == [(3, 9), (1, 1), (2, 4)]


def test_results_come_in_order_and_what_kills_its_worker_is_named() -> None:
    found = list(in_order(square, range(30), workers=2))
    assert [item for item, _ in found] == list(range(30))
    assert [item for item, result in found if isinstance(result, WorkerDied)] == [13]
    assert [result for item, result in found if item != 13] == [number**2 for number in range(30) if number != 13]


def test_only_a_few_items_are_read_ahead() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        while read < 1000:
            read += 1
            yield 1

    results = in_order(square, items(), workers=1)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert read < 10


def test_an_error_of_the_function_is_raised() -> None:
    with pytest.raises(ValueError, match="negative"):
        list(in_order(square, [1, -1], workers=1))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from mars.data.workers import in_order\n"
        "def pid(_): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for _, worker in in_order(pid, [1, 2], workers=1):\n"
        "        print(worker, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # A worker holds this pipe too, so waiting for its end is waiting for the worker.
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0
