from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from mars.errors import CheckpointError
from mars.model.transformer import MarsTransformer
from mars.training.optim import Average, Muon, build_optimizers, orthogonalize, rate_at, restore_optimizers
from mars.training.stages import OptimizerConfig


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalize_makes_all_singular_values_about_1(shape: tuple[int, int], scale: float) -> None:
    matrices = torch.randn(3, *shape) * scale
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    smallest = 0.6 if shape[0] != shape[1] else 0.0  # of a square matrix the smallest starts near 0
    assert float(values.min()) > smallest
    assert float(values.max()) < 1.3
    assert float(values.median()) == pytest.approx(1, abs=0.35)


def test_orthogonalize_keeps_the_directions() -> None:
    left, values, right = torch.linalg.svd(torch.randn(2, 20, 50), full_matrices=False)
    found = orthogonalize(left @ torch.diag_embed(values) @ right)
    overlap = left.mT @ found @ right.mT
    off = overlap - torch.diag_embed(overlap.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-4


def test_orthogonalize_works_on_each_matrix_alone() -> None:
    matrices = torch.randn(4, 12, 30) * torch.tensor([1e-3, 1, 10, 1e3])[:, None, None]
    for alone, together in zip(matrices, orthogonalize(matrices), strict=True):
        assert torch.allclose(orthogonalize(alone[None])[0], together, atol=1e-5)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not bool(orthogonalize(torch.zeros(1, 8, 4)).any())


def test_muon_steps_by_its_rate_in_every_direction() -> None:
    weight, tall = nn.Parameter(torch.zeros(16, 48)), nn.Parameter(torch.zeros(64, 16))
    optimizer = Muon([weight, tall], lr=0.1, weight_decay=0.0)
    weight.grad, tall.grad = torch.randn(16, 48), torch.randn(64, 16)
    optimizer.step()
    for moved, grad, scale in ((weight, weight.grad, 1.0), (tall, tall.grad, 2.0)):
        values = torch.linalg.svdvals(moved.detach()) / (0.1 * scale)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
        assert float((moved.detach() * grad).sum()) < 0


def test_muon_is_its_formula_over_several_steps() -> None:
    weight = nn.Parameter(torch.randn(6, 10))
    wanted, momentum = weight.detach().clone(), torch.zeros(6, 10)
    optimizer = Muon([weight], lr=0.05, weight_decay=0.2, momentum=0.9)
    for _ in range(4):
        grad = torch.randn(6, 10)
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = orthogonalize((0.1 * grad + 0.9 * momentum)[None])[0]
        wanted = wanted * (1 - 0.05 * 0.2) - 0.05 * update
        assert torch.equal(weight.grad, grad)
    assert torch.allclose(weight, wanted, atol=1e-5)


def test_a_weight_without_gradient_is_left_alone() -> None:
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.randn(4, 4)
    Muon([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trained_weight_has_one_optimizer_and_only_matrices_of_experts_decay(
    name: str, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> None:
    visual = build_tiny(**pocket).visual_tensors()
    config = OptimizerConfig(name=name, learning_rate=1e-3, matrix_rate=0.05, weight_decay=0.1)  # type: ignore[arg-type]
    optimizers = build_optimizers(((key, nn.Parameter(visual[key])) for key in sorted(visual)), config)
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    assert sum(len(group["params"]) for _, group in groups) == len(visual)
    matrices = {tuple(tensor.shape) for key, tensor in visual.items() if ".visual." in key and tensor.dim() == 2}
    for optimizer, group in groups:
        assert group["peak"] == group["lr"] == (0.05 if isinstance(optimizer, Muon) else 1e-3)
        assert (group["weight_decay"] > 0) == all(tuple(weight.shape) in matrices for weight in group["params"])
    assert any(isinstance(optimizer, Muon) for optimizer in optimizers) == (name == "muon")


def rates(steps: int, **options: Any) -> list[float]:
    return [rate_at(step, steps=steps, config=OptimizerConfig(**options)) for step in range(steps)]


def test_a_rate_without_decay_warms_up_and_falls_as_a_cosine_to_a_tenth() -> None:
    found = rates(1000, warmup=50)
    assert found[0] == pytest.approx(1 / 50, rel=0.01)
    assert all(before < after for before, after in pairwise(found[:45]))
    assert all(before > after for before, after in pairwise(found[50:]))
    assert found[500] == pytest.approx(0.55, abs=0.01)
    assert 0.1 <= found[-1] < 0.101


def test_a_rate_with_decay_warms_up_stays_and_falls_in_a_line() -> None:
    found = rates(100, warmup=10, decay=20)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert found[-1] > 0


@pytest.mark.parametrize("decay", [None, 0, 500])
@pytest.mark.parametrize("warmup", [0, 3, 500])
def test_a_rate_is_never_0_nor_above_the_peak(warmup: int, decay: int | None) -> None:
    assert all(0 < rate <= 1 for rate in rates(60, warmup=warmup, decay=decay))


def test_an_average_forgets_and_is_younger_at_first() -> None:
    weights = {"a": torch.tensor([1.0])}
    average = Average(weights, decay=0.9)
    expected = 1.0
    for step in range(120):
        weights["a"] = torch.tensor([float(step)])
        average.update(weights, step=step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.values["a"]) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(119 - 9, abs=0.1)  # ten steps behind, as 0.9 says


def test_weights_hold_the_average_only_inside_the_block() -> None:
    weights = {"a": torch.tensor([1.0, 2.0])}
    average = Average(weights, decay=0.9)
    weights["a"] += 5
    with average.swapped(weights):
        assert weights["a"].tolist() == [1, 2]
    assert weights["a"].tolist() == [6, 7]
    assert average.values["a"].tolist() == [1, 2]


@pytest.mark.parametrize("key", ["0/b/step", "5/a/step", "0/a/exp_avg"])
def test_a_state_that_fits_no_weight_is_one_line(key: str) -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizers = [torch.optim.AdamW([weight])]
    with pytest.raises(CheckpointError, match=f"{key}, which fits no weight") as caught:
        restore_optimizers(optimizers, {key: torch.zeros(3)}, {"a": weight})
    assert "\n" not in str(caught.value)
