"""Whether weights will fit before they are read, and giving memory back."""

import ctypes
import re
from contextlib import suppress
from pathlib import Path

from mars.errors import ModelError

MEMINFO = Path("/proc/meminfo")
CLOSE_PROGRAMS = "close other programs, or take a machine with more"


def available_memory() -> int | None:
    """Bytes that a program may still take without swapping; None where the system does not say (only Linux does)."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"), flags=re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if found is None else int(found[1]) * 1024


def check_memory(needed: int, *, what: str, advice: str = CLOSE_PROGRAMS) -> None:
    """Raises ModelError when `needed` bytes are more than there are; `advice` is what to do then."""
    free = available_memory()
    if free is not None and needed > free:
        raise ModelError(f"{what} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {advice}")


def give_back() -> None:
    """Returns to the system what was freed but kept for later, where the C library is glibc; elsewhere nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_little() -> None:
    """Has glibc keep less of what is freed; elsewhere nothing. For programs that run long, before they start threads.

    All threads share two arenas: with one each, what one freed no other takes. Blocks of 4 MB and more go straight
    back, where otherwise all up to 32 MB come to be kept (man 3 mallopt).
    """
    arena_max, mmap_threshold = -8, -3
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 2)
        libc.mallopt(mmap_threshold, 4 << 20)
