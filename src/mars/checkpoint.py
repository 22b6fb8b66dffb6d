"""A folder of weights: `config.json` beside `.safetensors` files, saved whole or not at all, loaded strictly."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mars.errors import CheckpointError


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save {path}: {_reason(error)}; nothing was written") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return str(error)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(kept, partial, metadata=dict(metadata or {}))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save {path}: {_reason(error)}; nothing was written") from error
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes readable JSON whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot save {path}: {_reason(error)}; nothing was written") from error
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if the file is missing or holds no JSON object.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}; a model folder holds one") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(table).__name__}")
    return table


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, where: str) -> None:
    """Compares names and shapes, and looks for values that are not finite.

    Raises:
        CheckpointError: naming the first differences and their number.
    """
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name].shape != found[name].shape:
            problems.append(f"{name} must be {list(wanted[name].shape)}, got {list(found[name].shape)}")
        elif found[name].is_floating_point() and not bool(torch.isfinite(found[name]).all()):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{where} does not fit its configuration: {'; '.join(sorted(problems)[:3])}{rest}")


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copies tensors into a module's own dtype after `check_tensors`."""
    state = module.state_dict()
    check_tensors(tensors, state, where=where)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """`sha256:` over the sorted names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy())
    return f"sha256:{total.hexdigest()}"


