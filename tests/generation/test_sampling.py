import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mars.errors import RequestError
from mars.generation.sampling import NOISE_PLACES, Noise, Sampler, Sampling, gumbel, sample

LOGITS = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(
    lambda values: [v / 8 for v in values]
)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def restrict(logits: Tensor, *samplings: Sampling) -> Tensor:
    return Sampler(samplings, device=logits.device).restrict(logits)


def kept(logits: list[float], sampling: Sampling) -> set[int]:
    return set(torch.isfinite(restrict(torch.tensor([logits]), sampling)[0]).nonzero()[:, 0].tolist())


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


@given(logits=LOGITS, top_k=st.integers(0, 14))
def test_top_k_keeps_the_likeliest_k(logits: list[float], top_k: int) -> None:
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    assert kept(logits, Sampling(top_k=top_k)) == set(order[: top_k or None])


@given(logits=LOGITS, top_p=st.floats(0.05, 1), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_fewest_ids_that_hold_the_share(logits: list[float], top_p: float, temperature: float) -> None:
    shares = softmax([value / temperature for value in logits])
    order = sorted(range(len(logits)), key=lambda index: -shares[index])
    sums = [math.fsum(shares[index] for index in order[: count + 1]) for count in range(len(order))]
    if any(abs(total - top_p) < 1e-4 for total in sums):
        return  # fp32 and this oracle may differ on which side of the edge it lies
    count = next((index + 1 for index, total in enumerate(sums) if total >= top_p), len(order))
    assert kept(logits, Sampling(top_p=top_p, temperature=temperature)) == set(order[:count])


def test_top_p_counts_what_top_k_has_kept() -> None:
    logits = [math.log(share) for share in (0.4, 0.3, 0.2, 0.1)]
    assert kept(logits, Sampling(top_p=0.55)) == {0, 1}
    assert kept(logits, Sampling(top_p=0.55, top_k=2)) == {0}  # 0.4 of 0.7 is 0.57


def test_what_is_kept_keeps_its_logit() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    before = logits.clone()
    assert restrict(logits, Sampling(top_k=2)).tolist() == [[-math.inf, 2.0, -math.inf, 1.0]]
    assert restrict(logits, Sampling()) is logits
    assert torch.equal(logits, before)


def test_every_row_is_restricted_as_if_it_were_alone() -> None:
    logits = torch.randn(6, 40)
    samplings = [
        Sampling(top_k=3), Sampling(), Sampling(top_p=0.4, temperature=2.0), Sampling(top_k=9, top_p=0.5),
        Sampling(top_k=2**64), Sampling(top_p=0.2, temperature=0),
    ]  # fmt: skip
    together = restrict(logits, *samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(restrict(logits[row : row + 1], sampling)[0], together[row])
    assert together.isfinite().sum(dim=1).tolist()[:2] == [3, 40]


@pytest.mark.parametrize("block", [1, 4, 9, 25])
def test_noise_is_that_of_one_stream_whatever_is_made_ahead(block: int) -> None:
    noise = Noise(7, block=block, ids=11, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    steps = 3 * NOISE_PLACES // block + 2
    assert torch.equal(torch.stack([noise.take() for _ in range(steps)]), gumbel(generator, steps, block, 11))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(20, 30)
    chosen = sample(logits, [Sampling(temperature=temperature)] * 20, generators(*range(20)))
    assert torch.equal(chosen, logits.argmax(dim=1))


def frequencies(logits: Tensor, sampling: Sampling, *, draws: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = sample(logits.expand(draws, -1), [sampling] * draws, [generator] * draws)
    return torch.bincount(chosen, minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_ids_come_as_often_as_softmax_says(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -4.0])
    wanted = (logits / temperature).softmax(dim=0)
    found = frequencies(logits, Sampling(temperature=temperature))
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert bool(((found - wanted).abs() < 4 * error + 1e-9).all()), (found, wanted)


def test_ids_that_were_dropped_never_come_and_the_others_share_what_is_left() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    found = frequencies(logits, Sampling(top_k=3))
    wanted = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, 0.5]).softmax(dim=0)
    assert found[[0, 2]].tolist() == [0, 0]
    assert torch.allclose(found, wanted, atol=0.03)


def test_a_row_depends_on_its_own_logits_settings_and_seed_alone() -> None:
    logits = torch.randn(4, 50)
    samplings = [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5, temperature=2.0), Sampling(temperature=0)]
    together = sample(logits, samplings, generators(5, 6, 7, 8))
    for row, seed in enumerate((5, 6, 7, 8)):
        alone = sample(logits[row : row + 1], samplings[row : row + 1], generators(seed))
        assert torch.equal(alone, together[row : row + 1])


def test_seeds_differ_and_repeat() -> None:
    logits = torch.zeros(1, 1000)
    drawn = [int(sample(logits, [Sampling()], generators(seed))) for seed in (*range(10), *range(10))]
    assert drawn[:10] == drawn[10:]
    assert len(set(drawn)) > 5
    assert all(first != second for first, second in pairwise(drawn[:10]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("guidance", -1.0),
        ("guidance", 101.0),
        ("guidance", math.nan),
        ("temperature", math.nan),
    ],
)
def test_settings_that_mean_nothing_are_one_line(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name} must .*got {value}$"):
        Sampling(**{name: value})  # type: ignore[arg-type]
