"""AdamW, Muon, the schedule of their rates, and an average of the weights."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mars.errors import CheckpointError
from mars.training.stages import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""


def orthogonalize(matrices: Tensor, *, iterations: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, by Newton-Schulz in the input's own dtype; (N, rows, columns)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _orthogonalize_all(matrices: Tensor) -> Tensor:
    """`orthogonalize` of matrices whose rows may lie in several processes: each is given some of them whole."""
    if not isinstance(matrices, DTensor):
        return orthogonalize(matrices)
    whole = matrices.redistribute(placements=[Shard(0)])
    found = DTensor.from_local(
        orthogonalize(whole.to_local()),
        matrices.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=matrices.shape,
        stride=matrices.stride(),
    )
    return found.redistribute(placements=matrices.placements)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for the matrices inside a transformer (Jordan et al. 2024).

    Matrices of one shape are orthogonalised together, in `dtype` (bf16 is enough, and what `torch.optim.Muon` takes).
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(weights), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step of all weights that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                updates = torch.stack([self._momentum(weight, group["momentum"]) for weight in weights])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, _orthogonalize_all(updates.to(self.dtype)).unbind(), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> Tensor:
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)  # Nesterov's


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or for the tables and norms beside Muon for the experts' matrices.

    Tables and vectors are not decayed. `dtype` is of Muon's orthogonalisation.
    """
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    for name, weight in named:
        (matrices if ".visual." in name and weight.dim() == 2 else tables).append(weight)
    groups: list[dict[str, object]] = [{"params": tables, "weight_decay": 0.0, "lr": config.learning_rate}]
    if config.name == "adamw":
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "lr": config.learning_rate})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=config.betas, fused=True)]
    if config.name == "muon":
        optimizers.append(Muon(matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_at(step: int, *, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then WSD (flat, linear decay to 0) or a cosine to 10 %."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.decay is not None:
        return min(warm, (steps - step) / max(1, config.decay), 1.0)
    return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """What optimizers remember, as `NUMBER/WEIGHT/SLOT`.

    Args:
        names: of each weight, by its `id`.
    """
    return {
        f"{number}/{names[id(weight)]}/{slot}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for weight, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]
) -> None:
    """Puts back what `optimizer_tensors` gave; a weight that had no state yet has none.

    Raises:
        CheckpointError: if something belongs to no weight, or has another shape than its weight.
    """
    groups = [{id(weight) for group in one.param_groups for weight in group["params"]} for one in optimizers]
    for key, value in tensors.items():
        number, name, slot = key.split("/")
        weight = weights.get(name)
        fits = weight is not None and int(number) < len(groups) and id(weight) in groups[int(number)]
        if weight is None or not fits or (value.dim() and value.shape != weight.shape):
            raise CheckpointError(f"the optimizer's state has {key}, which fits no weight that is trained")
        optimizers[int(number)].state[weight][slot] = value if value.dim() else value.cpu()  # a count of steps


class Average:
    """A moving average of weights (Polyak and Juditsky 1992), younger at first: the decay grows from 0.1 with the steps
    as min(decay, (1 + step) / (10 + step))."""

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], *, step: int) -> None:
        """After a step, the first being 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(weights[name], 1 - decay)

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The weights hold the average inside the block, and what they were after it."""
        self._swap(weights)
        try:
            yield
        finally:
            self._swap(weights)

    @torch.no_grad()
    def _swap(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            kept = weights[name].clone()
            weights[name].copy_(value)
            value.copy_(kept)
