"""The C kernel of `model.quantized` and `model.decoding`: compiled once by the machine's compiler, or done without."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mars.errors import ModelError
from mars.files import cache_folder, whole_file

_SOURCE = Path(__file__).with_name("decode.c")
_PARTS = tuple(_SOURCE.with_name(f"{name}.c") for name in ("decode", "attention", "quantized", "halves", "amx"))
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fopenmp")
_WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8")
_SECONDS = 60

TILE = 16
"""Outputs of a tile of weights."""

KINDS = (torch.float32, torch.float16, torch.bfloat16)
"""Of weights that the kernel can round."""


class Weight(ctypes.Structure):
    """Addresses of a weight's codes and scales; `outputs` with the filler of the last tile."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_long),
        ("inputs", ctypes.c_long),
        ("bits", ctypes.c_long),
    )


class Layer(ctypes.Structure):
    """Addresses of what a layer is made of, and of its columns in the cache; null where there is none."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("q_bias", "k_bias", "v_bias", "attention_norm", "ffn_norm")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "v_norm", "keys", "values")),
    )


class Step(ctypes.Structure):
    """What all layers share in a step; see decode.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("first", "rows", "positions", "block")),
        *((name, ctypes.c_long) for name in ("width", "heads", "kv_heads", "head_width", "size", "longest")),
        ("used", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("last_eps", ctypes.c_double),
    )


class Kernel:
    """The compiled library. Its threads are PyTorch's, as both name the same OpenMP library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_long
        self._multiply = library.mars_multiply
        self._multiply.argtypes = [pointer, size, size, pointer, pointer, size]
        self._decode = library.mars_decode
        self._decode.argtypes = [pointer, pointer, size, pointer]
        self._quantize = library.mars_quantize
        self._quantize.argtypes = [pointer, ctypes.c_int, size, size, ctypes.c_int, pointer, pointer]
        self._quantize.restype = None
        self._pack = library.mars_pack
        self._pack.argtypes = [pointer, size, size, pointer, pointer]
        self._pack.restype = None
        self._packed_bytes = library.mars_packed_bytes
        self._packed_bytes.argtypes = [size, size]
        self._packed_bytes.restype = size
        self.may_run = bool(library.mars_may_run())
        """Whether the system lets this process use what the kernel was compiled for."""
        self.read = library.mars_read
        """Reads memory and does nothing with it: (address, words of 8 bytes)."""
        self.read.argtypes = [pointer, size]
        self.read.restype = ctypes.c_uint64

    def multiply(self, x: Tensor, rows: int, weights: Sequence[Weight], products: Sequence[Tensor]) -> None:
        """Products of x (rows, inputs) with several weights: each (rows, outputs with filler), all fp32 and contiguous.

        Raises:
            MemoryError: if there is none left for the rounded activations.
        """
        count, inputs = len(weights), weights[0].inputs
        outs = (ctypes.c_void_p * count)(*(product.data_ptr() for product in products))
        if self._multiply(x.data_ptr(), rows, inputs, (Weight * count)(*weights), outs, count):
            raise MemoryError("no memory for the activations of a quantized product")

    def quantize(self, weight: Tensor, codes: Tensor, scales: Tensor, *, bits: int) -> None:
        """Fills codes and scales, both contiguous, with a contiguous weight (outputs, inputs) of a type in `KINDS`."""
        addresses = codes.data_ptr(), scales.data_ptr()
        self._quantize(weight.data_ptr(), KINDS.index(weight.dtype), *weight.shape, bits, *addresses)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A contiguous fp32 weight (outputs, inputs) in 16 bits: codes (tiles, bytes) and fp32 scales (tiles, 16)."""
        outputs, inputs = weight.shape
        tiles = -(-outputs // TILE)
        codes = torch.empty(tiles, self._packed_bytes(TILE, inputs), dtype=torch.uint8)
        scales = torch.ones(tiles, TILE)
        self._pack(weight.data_ptr(), outputs, inputs, codes.data_ptr(), scales.data_ptr())
        return codes, scales

    def decode(self, x: Tensor, layers: "ctypes.Array[Layer]", step: Step) -> None:
        """Runs x (rows * positions, width) through layers and a last norm, in place, and adds columns to their caches.

        Raises:
            MemoryError: if there is none left for the activations.
        """
        if self._decode(x.data_ptr(), layers, len(layers), ctypes.byref(step)):
            raise MemoryError("no memory for the activations of a step")


@cache
def find_kernel() -> Kernel | None:
    """The kernel, compiled into the cache if it is not there; None without a C compiler or the instructions it needs.

    $CC names the compiler; `MARS_KERNEL=off` does without one.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or os.environ.get("MARS_KERNEL") == "off":
        return None
    found = _compile(compiler, _FLAGS)
    if found is not None and not found.may_run:
        found = _compile(compiler, _FLAGS + _WITHOUT_AMX)
    return found


def _compile(compiler: str, flags: tuple[str, ...]) -> Kernel | None:
    sources = b"".join(part.read_bytes() for part in _PARTS)
    key = hashlib.sha256(sources + repr((flags, compiler)).encode() + _processor()).hexdigest()
    library = cache_folder() / "kernels" / f"decode-{key[:16]}.so"
    try:
        if not library.is_file():
            with whole_file(library, error=ModelError) as partial:
                command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(partial), "-lm"]
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
