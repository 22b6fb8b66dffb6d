"""The C kernel behind `mars.model.quantized`: compiled once by the machine's own compiler, or done without."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mars.errors import ModelError
from mars.files import cache_folder, whole_file

_SOURCE = Path(__file__).with_name("quantized.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
_SECONDS = 60


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("outputs", ctypes.c_long),
    )


class Kernel:
    """The compiled library. Its threads are PyTorch's, as both name the same OpenMP library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_long
        self._linear = library.mars_quantized_linear
        self._linear.argtypes = [pointer, size, size, pointer, size, ctypes.c_int]
        self._linear.restype = ctypes.c_int
        self.read = library.mars_read
        """Reads memory and does nothing with it: (address, words of 8 bytes)."""
        self.read.argtypes = [pointer, size]
        self.read.restype = ctypes.c_uint64

    def multiply(
        self, x: int, rows: int, inputs: int, weights: Sequence[tuple[int, int, int, int]], *, bits: int
    ) -> None:
        """Products of x (rows, inputs) with several weights: addresses of codes, scales and product, and its outputs.

        Raises:
            MemoryError: if there is none left for the rounded activations.
        """
        array = (_Weight * len(weights))(*weights)
        if self._linear(x, rows, inputs, array, len(weights), bits):
            raise MemoryError("no memory for the activations of a quantized product")


@cache
def find_kernel() -> Kernel | None:
    """The kernel, compiled into the cache if it is not there; None without a C compiler or the instructions it needs.

    $CC names the compiler; `MARS_KERNEL=off` does without one.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or os.environ.get("MARS_KERNEL") == "off":
        return None
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, compiler)).encode() + _processor()).hexdigest()
    library = cache_folder() / "kernels" / f"quantized-{key[:16]}.so"
    try:
        if not library.is_file():
            with whole_file(library, error=ModelError) as partial:
                command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(partial), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        return Kernel(library)
    except (ModelError, OSError, subprocess.SubprocessError):
        return None


def _processor() -> bytes:
    """What `-march=native` depends on, so that a cache shared by machines serves each its own."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
