"""Several processes that train one model, by PyTorch's own engine: process groups, FSDP2 and DCP.

Every weight, gradient and optimizer state is divided among the processes, and weights are gathered layer by layer when
they are needed. The two experts of a layer are units of their own, so a gather never mixes what is frozen with what is
trained: frozen units are gathered only, they have no gradients to reduce and no optimizer state.

Each process knows the plan of the whole batch and takes its own part (`Processes.own`), so what a step learns from does
not depend on how many processes there are.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from mars.checkpoint import atomic_folder
from mars.errors import CheckpointError, ConfigError
from mars.files import reason
from mars.model.layers import Norm
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs, samples and models."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of something that all of them know; the parts differ in length by one at most."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, of any shape."""
        if self.size == 1:
            return values
        summed = values.detach().to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def most(self, number: int) -> int:
        """The largest number that any process has."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """`atomic_folder` that all processes write to; it becomes `path` when every one has ended well.

        Raises:
            CheckpointError: if it cannot be written.
        """
        if self.size == 1:
            with atomic_folder(path) as temporary:
                yield temporary
            return
        shared: list[Path | None] = [None]
        if self.first:
            with atomic_folder(path) as shared[0]:
                dist.broadcast_object_list(shared)
                yield cast(Path, shared[0])
                self.wait()
        else:
            dist.broadcast_object_list(shared)
            yield cast(Path, shared[0])
            self.wait()
        self.wait()  # until the folder is in place


@contextmanager
def join() -> Iterator[Processes]:
    """Meets the processes that torchrun started, as its environment says; without one, this process is alone.

    NCCL where there is a GPU per process, Gloo elsewhere.

    Raises:
        ConfigError: if the environment is incomplete.
    """
    gpu = torch.cuda.is_available()
    try:
        rank, size, local = (int(os.environ.get(key, one)) for key, one in _ENVIRONMENT.items())
    except ValueError:
        raise ConfigError(f"{', '.join(_ENVIRONMENT)} must be numbers; start several processes by torchrun") from None
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if size == 1:
        yield Processes(device=device)
        return
    if missing := [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is {size}, but {missing[0]} is missing; start several processes by torchrun")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    yield Processes(rank=rank, size=size, device=device)
    dist.barrier()
    dist.destroy_process_group()  # not after an error: the others may still be waiting for this process


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def shard(transformer: MarsTransformer, processes: Processes, *, dtype: torch.dtype = torch.float32) -> None:
    """Divides a transformer's weights among the processes; it is then called as before.

    Units: each layer's language expert, each layer's visual expert, the LLM's tables, and everything else that is
    trained. Frozen norms, which positions of both modalities pass, are kept whole by every process.

    Args:
        dtype: in which weights are gathered and multiplied on GPUs; shards, gradients' sums and states stay fp32.
    """
    if processes.size == 1:
        transformer.to(processes.device)
        return
    # Keys and values that an expert returns are views; nothing writes to them in place, which is what FSDP warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    norms = [module for module in transformer.modules() if isinstance(module, Norm)]
    whole = {weight for norm in norms for weight in norm.parameters() if not weight.requires_grad}
    for weight in whole:
        weight.data = weight.data.to(processes.device)
    halves = dtype is torch.bfloat16 and processes.device.type == "cuda"
    # Inputs are not cast: what flows between layers stays fp32, as it does under autocast in one process.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if halves else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in _units(transformer):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for name in ("text_logits", "special_logits", "visual_logits"):
        register_fsdp_forward_method(transformer, name)
    register_fsdp_forward_method(transformer.language_embedding, "logits")


def _units(transformer: MarsTransformer) -> Iterator[nn.Module]:
    """Modules that are gathered at once, inner ones first; what no other holds is the transformer's own."""
    for layer in transformer.layers:
        assert isinstance(layer, SemVIELayer)
        if layer.visual is not None:
            if not hasattr(layer.visual, "o_proj"):
                yield layer.language.o_proj  # used by both experts
            yield layer.visual
        yield layer.language
    yield transformer.language_embedding
    if hasattr(transformer, "language_head"):
        yield transformer.language_head
    yield transformer


def synchronize(transformer: nn.Module, *, due: bool) -> None:
    """Whether the next backward pass sums gradients over the processes; the last of an accumulation must."""
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(due)


def clip_gradients(weights: Sequence[Tensor], limit: float) -> float:
    """Scales all gradients so that their norm together is at most `limit`; returns what it was."""
    norm = nn.utils.clip_grad_norm_(weights, limit)
    return float(whole_tensor(norm))


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all processes, which must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole tensors in the first process's CPU memory, gathered one after the other; the others get none."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if processes.first:
            gathered[name] = whole.cpu()
    return gathered


def map_matrices(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """A function of whole matrices (N, rows, columns), whose rows may lie in several processes.

    Each process is then given some of the matrices, so that none is computed twice.
    """
    if not isinstance(matrices, DTensor):
        return function(matrices)
    spread = matrices.redistribute(placements=[Shard(0)])
    found = DTensor.from_local(
        function(spread.to_local()),
        matrices.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=matrices.shape,
        stride=matrices.stride(),
    )
    return found.redistribute(placements=matrices.placements)


@torch.no_grad()
def copy_whole(found: Tensor, *, into: Tensor) -> None:
    """Copies a whole tensor, which every process has, over one that may be divided among them."""
    if isinstance(into, DTensor):
        rows = list(into.placements)
        found = dist.tensor.distribute_tensor(found.to(into.device), into.device_mesh, rows, src_data_rank=None)
    into.copy_(found)


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by DCP, each process its own part, as safetensors files in an existing folder.

    Raises:
        CheckpointError: in every process, if any of them cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _one_line(f"cannot write {folder}"):
        dcp.save(dict(tensors), storage_writer=writer)


def load_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads over `tensors`, in place, what `save_shards` wrote in any number of processes.

    Raises:
        CheckpointError: if a file or a tensor is missing, damaged, or of another shape.
    """
    with _one_line(f"cannot read {folder}"):
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """DCP collects errors of all processes into one that every process raises."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is meant
            yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        lines = reason(cast(Exception, failure)).splitlines()
        raise CheckpointError(f"{what}: {lines[0] if lines else failure!r}") from error
