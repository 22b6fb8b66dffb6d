"""What a run asks of the machine: where to compute, and how several processes act as one.

This is one process on one device. Many processes are a subclass that overrides what they do differently
(`training.distributed`); the trainer knows nothing else of them.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mars.checkpoint import copy_tensors, save_tensors
from mars.errors import ConfigError
from mars.files import atomic_folder
from mars.model.transformer import MarsTransformer
from mars.training.parts import read_parts

T = TypeVar("T")
STATE = "training.safetensors"
"""What a run needs beside the model to continue."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bf16 matrices: on a CPU AMX has ten times the speed of fp32,
    AVX-512 BF16 four times (Zen 5), both measured, and a CPU with neither is a hundred times slower than in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))


def choose_device(name: str) -> torch.device:
    """The device of a configuration's `device`.

    Raises:
        ConfigError: for `cuda` where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be 'cpu' or 'auto' here, got 'cuda': PyTorch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Process:
    """One process on one device."""

    rank = 0
    world = 1
    """How many processes share each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this one writes what all share."""
        return self.rank == 0

    def place(self, transformer: MarsTransformer, *, dtype: torch.dtype) -> None:  # noqa: ARG002
        """Brings a transformer to where it is trained; its parameters may be other objects afterwards.

        Args:
            dtype: of products, for which weights may be brought together in fewer bits.
        """
        transformer.to(self.device)

    def synchronizing(self, transformer: MarsTransformer, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Around the passes of a part of a step: gradients are averaged over processes in the last part only."""
        return nullcontext()

    def clip(self, weights: Iterable[Tensor], *, limit: float) -> float:
        """Scales all gradients so that their norm is at most `limit`; returns what it was."""
        return float(nn.utils.clip_grad_norm_(weights, limit))

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes; every one names the same values."""
        return dict(values)

    def most(self, number: int) -> int:
        """The largest that any process has."""
        return number

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - a question about it
        """Whether it is so in any process."""
        return flag

    def decide(self, choose: Callable[[], T]) -> T:
        """What the main process chooses, or its error, in every process."""
        return choose()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are without sharding, in the main process; may be empty in others."""
        return dict(tensors)

    def load(self, found: Mapping[str, Tensor], *, into: Mapping[str, Tensor], where: str) -> None:
        """Copies tensors, whole or placed, over those of the same names; CheckpointError if they do not fit."""
        copy_tensors(found, into=into, where=where)

    def folder(self, path: Path) -> AbstractContextManager[Path]:
        """A folder that all processes write and that appears whole or not at all."""
        return atomic_folder(path)

    def write_state(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Stores what belongs to a run beside the model: optimizer, and weights where the model holds an average."""
        save_tensors(folder / STATE, tensors)

    def read_state(self, folder: Path, *, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `write_state` stored, in however many processes.

        Args:
            weights: as they are placed, by name; a stored tensor of a weight's shape is to be placed like it.
        """
        return read_parts(folder, weights=weights, device=self.device)
