"""Quality against cost, of two models: the ratio of costs at equal quality, a table and a plot. Knows numbers only.

A curve is a model's snapshots; what it has reached at a cost is the best up to there. Between two snapshots the quality
is taken to change with the logarithm of the cost. A level that a curve does not reach has no cost, only a bound; nor is
there more than a bound where the first snapshot has reached it already.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.efficiency_runs import DIFFUSION, OURS

FAMILIES = {OURS: "#4477aa", DIFFUSION: "#cc6677"}
"""With their colours."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of quality."""

    title: str
    higher: bool = True
    """Whether more is better."""

    def shown(self, value: float) -> str:
        """As tables give it."""
        return f"{value:.1%}" if self.higher else f"{value:.3f}"


METRICS = {
    "top1": Metric(title="emoji, top-1 of 100"),
    "top5": Metric(title="emoji, top-5 of 100"),
    "paraphrases": Metric(title="held-out paraphrases, top-1 of 100"),
    "composition": Metric(title="unseen combinations, right"),
    "fid": Metric(title="FID (EfficientNet-Lite0)", higher=False),
    "kid": Metric(title="KID (EfficientNet-Lite0)", higher=False),
}
COSTS = {"flops": "training FLOPs", "seconds": "wall time"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a curve needs to reach a level."""

    value: float
    bound: str = ""
    """`<=` where the first snapshot is there already, `>` where none is."""


def cost_to_reach(costs: Sequence[float], values: Sequence[float], level: float, *, higher: bool) -> Cost:
    """What a curve, given by rising costs, needs for a level."""
    sign = 1 if higher else -1
    best = -math.inf
    for place, (cost, value) in enumerate(zip(costs, values, strict=True)):
        if sign * value >= sign * level:
            if place == 0:
                return Cost(value=cost, bound="<=")
            share = (sign * level - best) / (sign * value - best)
            return Cost(value=math.exp(math.log(costs[place - 1]) * (1 - share) + math.log(cost) * share))
        best = max(best, sign * value)
    return Cost(value=costs[-1], bound=">")


def ratio(ours: Cost, theirs: Cost) -> Cost | None:
    """Ours over theirs, with the bound that follows; null where nothing follows."""
    turned = {"": "", "<=": ">=", ">": "<"}[theirs.bound]
    bounds = {bound[0] for bound in (ours.bound, turned) if bound}
    if len(bounds) > 1:
        return None
    bound = min((bound for bound in (ours.bound, turned) if bound), key=len, default="")
    return Cost(value=ours.value / theirs.value, bound=bound)


Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""Points of both families, each with its costs and its `scores`."""


def _values(points: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(point["scores"][name]["value"]) for point in points]


def compare(curves: Curves) -> list[dict[str, Any]]:
    """For each figure the cost of the best that either model reached, for both models: a row each."""
    rows = []
    for name, metric in METRICS.items():
        if any(name not in point["scores"] for points in curves.values() for point in points):
            continue
        choose = max if metric.higher else min
        for whose in FAMILIES:
            level = choose(_values(curves[whose], name))
            row: dict[str, Any] = {"metric": name, "level_of": whose, "level": level}
            for cost in COSTS:
                reached = {
                    family: cost_to_reach(
                        [float(point[cost]) for point in points], _values(points, name), level, higher=metric.higher
                    )
                    for family, points in curves.items()
                }
                found = ratio(reached[OURS], reached[DIFFUSION])
                row[cost] = {family: asdict(one) for family, one in reached.items()}
                row[cost]["ratio"] = None if found is None else asdict(found)
            rows.append(row)
    return rows


def _cost_cell(name: str, cost: Mapping[str, Any]) -> str:
    value = f"{cost['value']:.2e}" if name == "flops" else f"{cost['value'] / 3600:.2f} h"
    if cost["bound"] == ">":
        return f"not reached (> {value})"
    return f"{cost['bound']} {value}".strip()


def _ratio_cell(found: Mapping[str, Any] | None) -> str:
    return "?" if found is None else f"{found['bound']} {found['value']:.1%}".strip()


def markdown(report: Mapping[str, Any]) -> str:
    """Two tables: costs at equal quality, and all points."""
    lines = [
        "Training compute at equal quality: ours over the diffusion model's. Levels are the best that one of them "
        "reached; between snapshots, costs are interpolated.",
        "",
        "| figure | level | whose best | FLOPs, ours | diffusion | ratio | time, ours | diffusion | ratio |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["comparison"]:
        metric = METRICS[row["metric"]]
        cells = [metric.title, metric.shown(row["level"]), row["level_of"]]
        for cost in COSTS:
            cells += [_cost_cell(cost, row[cost][family]) for family in FAMILIES]
            cells.append(_ratio_cell(row[cost]["ratio"]))
        lines.append(f"| {' | '.join(cells)} |")
    names = [name for name in METRICS if any(row["metric"] == name for row in report["comparison"])]
    titles = " | ".join(METRICS[name].title for name in names)
    lines += [
        "",
        f"| model | steps | samples | FLOPs | captions read, FLOPs | hours | s a picture drawn | {titles} |",
        f"|---|{'--:|' * (6 + len(names))}",
    ]
    for family in FAMILIES:
        for point in report["points"][family]:
            cells = [family, f"{point['step']:,}", f"{point['samples']:,}", f"{point['flops']:.2e}"]
            cells += [f"{point['text_flops']:.2e}", f"{point['seconds'] / 3600:.2f}"]
            cells.append(f"{point['drawing_seconds']:.2f}")
            cells += [_score_cell(METRICS[name], point["scores"][name]) for name in names]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *report["notes"]]) + "\n"


def _score_cell(metric: Metric, score: Mapping[str, Any]) -> str:
    found = metric.shown(score["value"])
    if "interval" in score:
        found += f" ({metric.shown(score['interval'][0])}..{metric.shown(score['interval'][1])})"
    return found


def draw_plot(report: Mapping[str, Any], path: Path) -> None:
    """Each figure against FLOPs and against time, with 95 % intervals where there are some."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(row["metric"] for row in report["comparison"]))
    figure = Figure(figsize=(11, 3.0 * len(names)), dpi=90, layout="constrained")
    panels = figure.subplots(len(names), len(COSTS), squeeze=False)
    for name, row in zip(names, panels, strict=True):
        metric = METRICS[name]
        for (cost, title), axes in zip(COSTS.items(), row, strict=True):
            for family, colour in FAMILIES.items():
                points = report["points"][family]
                unit = 3600 if cost == "seconds" else 1
                values = _values(points, name)
                edges = [
                    point["scores"][name].get("interval", [value] * 2)
                    for point, value in zip(points, values, strict=True)
                ]
                off = [[abs(edge[end] - value) for edge, value in zip(edges, values, strict=True)] for end in (0, 1)]
                places = [point[cost] / unit for point in points]
                axes.errorbar(places, values, yerr=off, color=colour, label=family, marker="o", capsize=3)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())  # or labels overlap within a decade
            axes.set_xlabel(f"{title}, hours" if cost == "seconds" else title)
            axes.set_ylabel(metric.title + ("" if metric.higher else " (less is better)"))
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(path, metadata={"Software": None})
