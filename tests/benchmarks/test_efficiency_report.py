import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.efficiency_report import METRICS, Cost, compare, cost_to_reach, draw_plot, markdown, ratio
from benchmarks.efficiency_runs import DIFFUSION, OURS


def test_costs_are_interpolated_by_their_logarithm_on_the_best_so_far() -> None:
    costs, values = [1e12, 1e13, 1e14, 1e15], [0.1, 0.3, 0.2, 0.5]
    assert cost_to_reach(costs, values, 0.2, higher=True).value == pytest.approx(10**12.5)
    assert cost_to_reach(costs, values, 0.3, higher=True) == Cost(value=pytest.approx(1e13))  # type: ignore[arg-type]
    later = cost_to_reach(costs, values, 0.4, higher=True)  # half of the way from 0.3, not from 0.2
    assert later.value == pytest.approx(10**14.5)
    less = cost_to_reach(costs, [-value for value in values], -0.4, higher=False)
    assert less == later


def test_what_is_not_reached_has_a_bound_and_no_cost() -> None:
    costs, values = [1e12, 1e13], [0.1, 0.3]
    assert cost_to_reach(costs, values, 0.31, higher=True) == Cost(value=1e13, bound=">")
    assert cost_to_reach(costs, values, 0.05, higher=True) == Cost(value=1e12, bound="<=")


@pytest.mark.parametrize(
    ("ours", "theirs", "bound"),
    [
        ("", "", ""),
        ("<=", "", "<="),
        ("", "<=", ">="),
        (">", "", ">"),
        ("", ">", "<"),
        ("<=", ">", "<"),
        (">", "<=", ">"),
    ],
)
def test_a_ratio_has_the_bound_that_follows(ours: str, theirs: str, bound: str) -> None:
    assert ratio(Cost(value=2, bound=ours), Cost(value=8, bound=theirs)) == Cost(value=0.25, bound=bound)


@pytest.mark.parametrize("bound", ["<=", ">"])
def test_two_bounds_of_one_kind_say_nothing(bound: str) -> None:
    assert ratio(Cost(value=2, bound=bound), Cost(value=8, bound=bound)) is None


def point(flops: float, quality: float) -> dict[str, Any]:
    scores = {
        name: {"value": quality if metric.higher else 1 - quality} | ({"interval": [0.0, 1.0]} if metric.higher else {})
        for name, metric in METRICS.items()
    }
    return {
        "step": 1, "samples": 48, "flops": flops, "text_flops": 10, "seconds": flops / 1e10, "drawing_seconds": 0.5,
        "scores": scores,
    }  # fmt: skip


def test_a_model_that_needs_a_tenth_is_told_so_for_every_figure(tmp_path: Path) -> None:
    qualities = [0.1, 0.3, 0.6, 0.8]
    curves = {
        OURS: [point(10.0**power, quality) for power, quality in enumerate(qualities, 11)],
        DIFFUSION: [point(10.0**power, quality) for power, quality in enumerate(qualities[:3], 12)],
    }
    rows = compare(curves)
    assert len(rows) == 2 * len(METRICS)
    for row in rows:
        for cost in ("flops", "seconds"):
            if row["level_of"] == DIFFUSION:
                assert row[cost]["ratio"]["value"] == pytest.approx(0.1)
                assert row[cost]["ratio"]["bound"] == ""
            else:
                assert row[cost][DIFFUSION]["bound"] == ">"
                assert row[cost]["ratio"] == {"value": pytest.approx(1), "bound": "<"}
    report = {"points": curves, "comparison": rows, "notes": ["A note."]}
    page = markdown(report)
    assert page.count("| 10.0% |") == 2 * len(METRICS)
    assert page.count("not reached (> 1.00e+14)") == len(METRICS)
    assert "A note." in page
    draw_plot(report | {"comparison": rows[:2]}, tmp_path / "plot.png")  # one figure
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 500


def test_a_figure_that_a_point_lacks_is_left_out() -> None:
    curves = {OURS: [point(1e12, 0.5)], DIFFUSION: [point(1e12, 0.5)]}
    del curves[DIFFUSION][0]["scores"]["paraphrases"]
    assert {row["metric"] for row in compare(curves)} == METRICS.keys() - {"paraphrases"}
    assert math.isfinite(compare(curves)[0]["level"])
