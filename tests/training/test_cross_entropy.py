from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mars.training import cross_entropy
from mars.training.cross_entropy import token_loss

N, D, V = 50, 12, 40
Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    states, table = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    return states.requires_grad_(), table.requires_grad_(), torch.randint(V, (N,), generator=generator)


def plain(states: Tensor, table: Tensor, targets: Tensor, *, z_loss: float) -> Tensor:
    logits = F.linear(states, table).float()
    return F.cross_entropy(logits, targets) + z_loss * logits.logsumexp(1).square().mean()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, z_loss: float, rows: int
) -> None:
    states, table, targets = problem
    wanted = plain(*problem, z_loss=z_loss)
    right = torch.autograd.grad(3 * wanted, (states, table))
    monkeypatch.setattr(cross_entropy, "CHUNK", rows * V)
    found = token_loss(states, table, targets, z_loss=z_loss)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for one, other in zip(torch.autograd.grad(3 * found.loss, (states, table)), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_figures_for_the_log_carry_no_gradient(problem: Problem) -> None:
    states, table, targets = problem
    found = token_loss(states, table, targets, z_loss=0.3)
    logits = (states @ table.T).detach()
    torch.testing.assert_close(found.nats, F.cross_entropy(logits, targets))
    torch.testing.assert_close(found.logit_norm, logits.norm(dim=1).mean())
    assert not found.nats.requires_grad
    assert not found.logit_norm.requires_grad


def test_a_frozen_table_gets_no_gradient_and_the_states_theirs(problem: Problem) -> None:
    states, table, targets = problem
    (wanted,) = torch.autograd.grad(token_loss(*problem).loss, states)
    frozen = table.detach()
    loss = token_loss(states, frozen, targets).loss
    (found,) = torch.autograd.grad(loss, states)
    assert torch.equal(found, wanted)
    with torch.no_grad():
        assert not token_loss(*problem).loss.requires_grad


def test_under_autocast_it_is_what_autocast_gives(problem: Problem) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = plain(*problem, z_loss=0.1), token_loss(*problem, z_loss=0.1).loss
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    right = torch.autograd.grad(wanted, problem[:2])
    for one, other in zip(torch.autograd.grad(found, problem[:2]), right, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)
        assert one.dtype is torch.float32


def test_memory_does_not_grow_with_positions_times_vocabulary(peak: Callable[[Callable[[], object]], int]) -> None:
    vocabulary, width = 8192, 16
    table = torch.randn(vocabulary, width).requires_grad_()

    def learn(count: int, *, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        states, targets = torch.randn(count, width).requires_grad_(), torch.randint(vocabulary, (count,))
        return lambda: loss(states, table, targets).backward()

    def chunks(*problem: Tensor) -> Tensor:
        return token_loss(problem[0], problem[1], problem[2]).loss

    learn(64, loss=chunks)()  # what is allocated once
    few, many = peak(learn(2048, loss=chunks)), peak(learn(8192, loss=chunks))
    logits = 4 * 8192 * vocabulary
    assert peak(learn(8192, loss=lambda *problem: plain(*problem, z_loss=0.0))) > 1.5 * logits
    assert many < 0.4 * logits
    assert many - few < 0.3 * logits  # four times the positions; allocators differ by some megabytes
