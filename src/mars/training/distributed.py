"""Several processes that train one model, by PyTorch's own engine: process groups, FSDP2 and DCP.

Every weight, gradient and optimizer state is divided among the processes, and weights are gathered layer by layer when
they are needed. The two experts of a layer are units of their own, so that no gather mixes what is frozen with what is
trained: frozen units are gathered only, they have no gradients to sum and no optimizer state.

    unit                      gathered                     freed
    layers.N.language         for a segment of text        behind it, and again where its backward pass ends
    layers.N.visual           for a segment of an image    likewise
    the LLM's embedding       for a segment of text        likewise; part of the next where it is the head as well
    heads, visual tables      at a step's first segment    where the step's backward pass ends: losses read them
    frozen norms              never divided: they are small, and positions of both modalities pass them
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mars.checkpoint import copy_tensors
from mars.errors import CheckpointError, ConfigError, MarsError
from mars.files import atomic_folder
from mars.model.layers import Norm
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.training.parts import write_parts
from mars.training.process import Process

T = TypeVar("T")
LOCAL = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""
SETTLING = 0.5
"""Seconds for Gloo's threads to let go of the tensors of the last messages: a thread that still does when Python ends
aborts the process (seen in one run of ten on a busy machine)."""


@contextmanager
def join(device: torch.device) -> Iterator[Process]:
    """Meets the processes that torchrun started, as the environment says; without them, this process is alone.

    They talk by NCCL between GPUs and by Gloo between CPUs.

    Raises:
        ConfigError: if the environment is incomplete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Process(device)
        return
    if missing := [name for name in LOCAL if name not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is set, so {missing[0]} must be as well; start several processes by torchrun")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield ShardedProcess(device)
    dist.barrier()  # not after an error: the others may never come here, and torchrun ends them
    time.sleep(SETTLING)
    dist.destroy_process_group()


class ShardedProcess(Process):
    """One of several processes, each with a part of every weight."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def place(self, transformer: MarsTransformer, *, dtype: torch.dtype) -> None:
        """Divides a transformer's weights among the processes; it is called as before.

        Args:
            dtype: in which GPUs gather weights; shards, sums of gradients and optimizer states stay fp32.
        """
        # Keys and values that an expert returns are views; nothing writes to them in place, which is what FSDP fears.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.world,))
        norms = [module for module in transformer.modules() if isinstance(module, Norm)]
        whole = {weight for norm in norms for weight in norm.parameters() if not weight.requires_grad}
        for weight in whole:
            weight.data = weight.data.to(self.device)
        halves = dtype is torch.bfloat16 and self.device.type == "cuda"
        # What flows between layers is not cast: it stays fp32, as under autocast in one process.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if halves else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for unit in _units(transformer):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)

    @contextmanager
    def synchronizing(self, transformer: MarsTransformer, *, last: bool) -> Iterator[None]:
        """Around the passes of a part of a step: gradients are averaged over processes in the last part only."""
        assert isinstance(transformer, FSDPModule)
        transformer.reshard()  # a pass without a graph, such as of held-out pictures, left old tables gathered
        transformer.set_requires_gradient_sync(last)
        yield

    def clip(self, weights: Iterable[Tensor], *, limit: float) -> float:
        """Scales all gradients so that their norm is at most `limit`; returns what it was."""
        return float(_whole(nn.utils.clip_grad_norm_(weights, limit)))

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes; every one names the same values."""
        summed = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(summed)
        return dict(zip(values, summed.tolist(), strict=True))

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - a question about it
        """Whether it is so in any process."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """The largest that any process has."""
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def decide(self, choose: Callable[[], T]) -> T:
        """What the main process chooses, or its error, in every process."""
        told: list[tuple[T | None, MarsError | None]] = [(None, None)]
        if self.is_main:
            try:
                told[0] = choose(), None
            except MarsError as error:
                told[0] = None, error
        dist.broadcast_object_list(told)
        chosen, problem = told[0]
        if problem is not None:
            raise problem
        return cast(T, chosen)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are without sharding, in the main process's CPU memory; others get none."""
        gathered = {}
        for name, tensor in tensors.items():
            found = _whole(tensor.detach())
            if self.is_main:
                gathered[name] = found.cpu()
        return gathered

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """A folder that all processes write and that appears whole or not at all."""
        with ExitStack() as opened:
            yield self.decide(lambda: opened.enter_context(atomic_folder(path)))
            dist.barrier()  # all have written
            self.decide(opened.close)

    def load(self, found: Mapping[str, Tensor], *, into: Mapping[str, Tensor], where: str) -> None:
        """Copies tensors, whole or placed, over those of the same names; CheckpointError if they do not fit."""
        parts = {name: _part(tensor, like=into.get(name)) for name, tensor in found.items()}
        problem: CheckpointError | None = None
        try:
            copy_tensors(parts, into={name: _local(tensor) for name, tensor in into.items()}, where=where)
        except CheckpointError as error:
            problem = error
        if self.any(problem is not None):
            raise problem or CheckpointError(f"{where} does not fit its configuration, as another process says")

    def write_state(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Stores what belongs to a run beside the model; each process writes its own part."""
        write_parts(folder, tensors)


def _units(transformer: MarsTransformer) -> Iterator[nn.Module]:
    """Modules that are gathered at once, inner ones first; what no other holds is the transformer's own."""
    for layer in transformer.layers:
        assert isinstance(layer, SemVIELayer)
        if layer.visual is not None:
            if not hasattr(layer.visual, "o_proj"):
                yield layer.language.o_proj  # used by both experts
            yield layer.visual
        yield layer.language
    if hasattr(transformer, "language_head"):
        yield transformer.language_embedding
    yield transformer


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor, *, like: Tensor | None) -> Tensor:
    """This process's part of a tensor that every process has whole."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == like.shape:
        moved = tensor.to(like.device)
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return _local(tensor)
