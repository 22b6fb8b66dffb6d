from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from mars.evaluation.plots import plot

FIGURES = {"model": 0.5, "floor": 0.01, "ceiling": 0.9, "model_interval": [0.43, 0.57]}


def both(figure: str) -> dict[str, Any]:
    return {language: {figure: FIGURES} for language in ("en", "zh")}


def test_each_bench_has_a_panel_and_other_figures_another_picture() -> None:
    retrieval, composition = {"trained names": both("top1")}, {"colour": both("right"), "count": both("right")}
    one, two = plot({"retrieval": retrieval}), plot({"retrieval": retrieval, "composition": composition})
    assert one is not None
    assert two is not None
    assert two.size == (one.width, 2 * one.height)
    again = plot({"retrieval": retrieval})
    assert again is not None
    assert np.array_equal(np.asarray(one), np.asarray(again))
    changed = {"trained names": {**both("top1"), "zh": {"top1": {**FIGURES, "model": 0.8}}}}
    other = plot({"retrieval": changed})
    assert other is not None
    assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_a_report_without_rates_has_no_plot() -> None:
    assert plot({"image_tokenizer": {}}) is None
