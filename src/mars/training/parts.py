"""Tensors in files that several processes write, each its own part, and that any number of processes reads: PyTorch's
distributed checkpoints (DCP) as safetensors.

One whole safetensors file is such a checkpoint too. Nothing is pickled.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mars.errors import CheckpointError
from mars.files import reason


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes this process's part of tensors that all name alike into an existing folder.

    Raises:
        CheckpointError: in every process, if one of them cannot write.
    """
    with _one_line(f"cannot write {folder}"):
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_parts(folder: Path, *, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """This process's part of what all safetensors files of a folder hold under names with a `/` between their parts.

    Args:
        weights: what is named after one of them and has its shape is divided among the processes as it is.

    Raises:
        CheckpointError: if a file is damaged.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _one_line(f"cannot read {folder}"):
        stored = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for name, found in stored.items():
            if "/" not in name or not isinstance(found, TensorStorageMetadata):
                continue
            named = [weights[part] for part in name.split("/") if part in weights]
            if named and named[0].shape == found.size:
                tensors[name] = torch.empty_like(named[0], dtype=found.properties.dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(found.size, dtype=found.properties.dtype, device=device)
        load(tensors, storage_reader=reader)
    return tensors


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone is meant
            yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what}: {reason(error)}") from error
    except CheckpointException as error:  # the errors of all processes, raised in each of them
        failure, _ = next(iter(error.failures.values()))
        lines = reason(failure).splitlines() if isinstance(failure, Exception) else []
        raise CheckpointError(f"{what}: {lines[0] if lines else type(failure).__name__}") from error
