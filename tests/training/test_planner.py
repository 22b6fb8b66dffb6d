from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars.errors import RequestError
from mars.model.costs import meta_transformer
from mars.model.presets import PRESETS
from mars.training.planner import (
    GPUS,
    PAPER_A100_DAYS,
    PAPER_PAIRS,
    SD15_A100_DAYS,
    Planner,
    Stage,
    find_gpu,
    gpu_days,
    implied_utilisation,
    paper_stages,
    plan,
)

QWEN = PRESETS["qwen-7b"]
MINI = PRESETS["smollm2-135m"]
A100 = GPUS["a100"][1]


@pytest.fixture(scope="module")
def qwen() -> Planner:
    return Planner(QWEN)


def test_the_implied_utilisation_put_back_gives_587_a100_days(qwen: Planner) -> None:
    total = qwen.total(paper_stages(QWEN.grid))
    share = implied_utilisation(total, peak=A100, days=PAPER_A100_DAYS)
    assert 0.35 < share < 0.5  # what well-kept trainings reach, so the assumptions may hold
    assert gpu_days(total, peak=A100, utilisation=share) == pytest.approx(PAPER_A100_DAYS, rel=1e-12)
    found = plan(QWEN, gpu="a100", utilisation=share)
    assert found["planned stages"]["all"]["GPU days"] == pytest.approx(PAPER_A100_DAYS, rel=1e-12)
    told = found["what 587 A100 days would mean"]["under the assumptions below"]
    assert told["implied utilisation"] == pytest.approx(share, rel=1e-12)


def test_the_published_budgets_stand_beside_the_plan_of_the_papers_model_only() -> None:
    budgets = plan(QWEN)["training budgets in A100 days"]
    assert {PAPER_A100_DAYS, SD15_A100_DAYS} <= set(budgets.values())
    assert budgets["MARS's share of Stable Diffusion 1.5, from the paper's figures"] == pytest.approx(0.094, abs=5e-4)
    assert SD15_A100_DAYS * 24 == 150_000  # hours, as its model card says
    other = plan(MINI)
    assert not any("587" in name or "budgets" in name for name in other)
    assert other["assumptions of the planner"] == plan(QWEN)["assumptions of the planner"]


def test_a_plan_is_the_sum_of_its_stages() -> None:
    rows = plan(QWEN, gpu="h100", utilisation=0.35)["planned stages"]
    stages = [row for name, row in rows.items() if name != "all"]
    for key in ("FLOPs", "GPU days"):
        assert sum(row[key] for row in stages) == pytest.approx(rows["all"][key], rel=1e-12)


def test_a_stage_costs_six_flops_per_trained_parameter_and_position_and_some_attention(qwen: Planner) -> None:
    """The estimate of the field (Kaplan et al. 2020), which leaves attention and the frozen text out."""
    alignment = replace(paper_stages(QWEN.grid)[0], captioning=False)
    trained = sum(
        weight.numel()
        for name, weight in meta_transformer(QWEN.model).visual_tensors().items()
        if weight.dim() == 2 and (".visual." in name or name == "visual_head.weight")
    )
    rough = 6 * trained * 256
    assert rough < qwen.sample_flops(alignment) < 1.1 * rough


@given(
    flops=st.floats(1e15, 1e25),
    peak=st.sampled_from([peak for _, peak in GPUS.values()]),
    days=st.floats(0.01, 1e6),
    share=st.floats(0.01, 1),
)
def test_days_and_utilisation_are_inverse_and_monotone(flops: float, peak: float, days: float, share: float) -> None:
    needed = gpu_days(flops, peak=peak, utilisation=share)
    assert implied_utilisation(flops, peak=peak, days=needed) == pytest.approx(share, rel=1e-9)
    assert gpu_days(flops, peak=peak, utilisation=share / 2) == pytest.approx(2 * needed, rel=1e-9)
    assert gpu_days(2 * flops, peak=peak, utilisation=share) == pytest.approx(2 * needed, rel=1e-9)
    assert implied_utilisation(flops, peak=peak, days=2 * days) < implied_utilisation(flops, peak=peak, days=days)


def test_more_data_longer_captions_and_larger_pictures_take_longer() -> None:
    planner = Planner(MINI)
    base = Stage(name="s", pairs=1000, epochs=1, caption=10, grids=((8, 8),))
    changes: list[dict[str, Any]] = [
        {"pairs": 1001},
        {"epochs": 1.5},
        {"caption": 11},
        {"grids": ((8, 9),)},
        {"grids": ((4, 4), (8, 8))},
        {"captioning": True},
    ]
    for change in changes:
        assert planner.stage_flops(replace(base, **change)) > planner.stage_flops(base), change


def test_pairs_of_each_stage_count_for_that_stage_alone() -> None:
    base = plan(MINI)["planned stages"]
    for index, name in enumerate(list(base)[:3]):
        pairs = list(PAPER_PAIRS)
        pairs[index] *= 2
        found = plan(MINI, pairs=pairs)["planned stages"]
        for other in list(base)[:3]:
            assert found[other]["FLOPs"] == pytest.approx(base[other]["FLOPs"] * (2 if other == name else 1))


def test_what_the_papers_figure_implies_is_said_of_the_papers_data_only() -> None:
    found = plan(QWEN, pairs=(1000, 1000, 1000))
    assert "what 587 A100 days would mean" not in found
    assert found["assumptions of the planner"][0] == "pairs: as given"
    assert "unconfirmed" in plan(QWEN)["assumptions of the planner"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "abacus"}, "gpu must be one of a100, "),
        ({"utilisation": 0.0}, "utilisation must lie above 0 and up to 1, got 0.0"),
        ({"utilisation": 1.01}, "utilisation must lie above 0 and up to 1, got 1.01"),
        ({"utilisation": float("nan")}, "utilisation must lie above 0 and up to 1, got nan"),
        ({"pairs": (1, 2)}, "there must be three numbers of pairs, one per stage, got 2"),
        ({"pairs": (1, 0, 2)}, "pairs of stage II refinement must be above 0, got 0"),
    ],
)
def test_what_cannot_be_planned_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(MINI, **change)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_found_however_it_is_written() -> None:
    assert find_gpu("A100") == ("NVIDIA A100", 312e12)
