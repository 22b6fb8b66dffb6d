import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mars.evaluation.metrics import hits, interval, ranks, resample, share_of_way, summary


def test_the_rank_is_the_number_of_closer_candidates() -> None:
    angles = torch.tensor([0.0, 0.2, 0.4, 0.6])
    candidates = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = candidates[:1]
    assert [int(ranks(query, candidates, right=right)[0]) for right in range(4)] == [0, 1, 2, 3]


def test_every_query_has_a_rank_of_its_own() -> None:
    candidates = torch.eye(3)
    queries = F.normalize(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), dim=1)
    assert ranks(queries, candidates, right=0).tolist() == [0, 2]


def test_a_candidate_that_is_equally_close_counts_against_the_right_one() -> None:
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert ranks(torch.tensor([[1.0, 0.0]]), candidates, right=0).tolist() == [1]


def test_hits_count_ranks_below_the_top() -> None:
    found = np.array([0, 1, 4, 5])
    assert hits(found, top=1).tolist() == [1, 0, 0, 0]
    assert hits(found, top=5).tolist() == [1, 1, 1, 0]


def test_the_share_of_the_way_is_zero_at_the_floor_and_one_at_the_ceiling() -> None:
    assert share_of_way(0.1, floor=0.1, ceiling=0.9) == 0
    assert share_of_way(0.9, floor=0.1, ceiling=0.9) == 1
    assert share_of_way(0.5, floor=0.1, ceiling=0.9) == pytest.approx(0.5)
    assert share_of_way(0.5, floor=0.9, ceiling=0.9) is None


def test_the_interval_of_a_rate_is_that_of_the_binomial() -> None:
    values = np.repeat([0.0, 1.0], 200)
    low, high = interval(resample([values], seed=0)[0])
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_arrays_are_resampled_together() -> None:
    values = np.random.default_rng(0).random(30)
    one, other = resample([values, 1 - values], seed=1)
    assert np.allclose(one + other, 1)


def test_a_summary_of_a_model_that_is_the_ceiling_goes_all_the_way() -> None:
    ceiling = np.array([1.0, 1.0, 0.0, 1.0])
    found = summary(ceiling, floor=np.zeros(4), ceiling=ceiling, seed=0)
    assert found["model"] == found["ceiling"] == 0.75
    assert found["share_of_way"] == 1
    assert found["share_of_way_interval"] == [1, 1]


def test_a_summary_without_a_way_has_no_share() -> None:
    found = summary(np.ones(3), floor=np.ones(3), ceiling=np.ones(3), seed=0)
    assert found["share_of_way"] is None
    assert found["share_of_way_interval"] is None
