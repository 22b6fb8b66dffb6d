import json
from pathlib import Path
from typing import Any

import pytest

from mars.cli.preset import describe_preset, render_preset
from mars.errors import RequestError


@pytest.fixture(scope="module")
def qwen() -> dict[str, Any]:
    return describe_preset("qwen-7b")


def test_the_papers_model_has_the_papers_figures(qwen: dict[str, Any]) -> None:
    assert qwen["vocabulary"]["all"] == 160_136
    assert qwen["parameters"]["language expert"] == 7_721_324_544
    # 7B trained, 14B in all.
    assert 6.4e9 < qwen["parameters"]["visual expert"] < 7e9
    assert 13.9e9 < qwen["parameters"]["all"] < 14.6e9
    assert qwen["cache bytes per token and row"]["bf16"]["drawing"] == 2 * 32 * 4096 * 2


def test_the_parts_of_a_table_add_up(qwen: dict[str, Any]) -> None:
    parts = qwen["parameters"]
    assert parts["language layers"] + parts["language tables"] == parts["language expert"]
    assert parts["visual layers"] + parts["visual tables"] == parts["visual expert"]
    assert parts["language expert"] + parts["visual expert"] + parts["image tokenizer"] == parts["all"]
    assert qwen["bytes"]["fp32"]["all"] == 4 * parts["all"] == 2 * qwen["bytes"]["bf16"]["all"]
    sizes = [qwen["bytes"][name]["all"] for name in ("fp32", "bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    flops = qwen["FLOPs"]
    assert flops["picture with guidance"] < 2 * flops["picture without guidance"]  # pixels are made once


def test_every_option_is_sized_and_the_default_is_the_presets(qwen: dict[str, Any]) -> None:
    options = qwen["visual expert under other options"]
    assert "this preset" not in options
    assert options["the default"]["parameters"] == qwen["parameters"]["visual expert"]
    # Two norms a layer and the last one; an output projection a layer.
    norms = options["its own norms"]["parameters"] - options["the default"]["parameters"]
    assert norms == (2 * 32 + 1) * 4096
    shared = options["the default"]["parameters"] - options["the LLM's output projection"]["parameters"]
    assert shared == 32 * 4096**2
    assert options["every fourth layer"]["layers"] == 8
    mini = describe_preset("smollm2-135m")
    own = mini["visual expert under other options"]["this preset"]
    assert own["parameters"] == mini["parameters"]["visual expert"]


def test_the_table_is_json_and_every_figure_of_it_is_shown(qwen: dict[str, Any]) -> None:
    assert json.loads(json.dumps(qwen)) == qwen
    shown = render_preset(qwen)
    assert "7,721,324,544" in shown
    assert "160,136" in shown
    lines = shown.splitlines()
    for name, section in qwen.items():
        assert name in shown
        if isinstance(section, dict):
            start = lines.index(name) + 1
            nested = any(isinstance(value, dict) for value in section.values())
            assert len({len(line) for line in lines[start : start + len(section) + nested]}) == 1, name
            for key in section:
                assert f"  {key} " in shown
        if isinstance(section, list):
            assert all(f"  - {line}" in lines for line in section)


def test_a_plan_can_be_made_for_other_machines_and_data(qwen: dict[str, Any]) -> None:
    found = describe_preset("qwen-7b", gpu="h100", utilisation=0.2, pairs=(100_000_000, 25_000_000, 5_000_000))
    expected = qwen["planned stages"]["all"]["GPU days"] * 312 / 989 * 0.4 / 0.2 / 2
    assert found["planned stages"]["all"]["GPU days"] == pytest.approx(expected)
    assert found["planner"]["GPU"] == "NVIDIA H100 SXM"


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(RequestError, match="preset must be a known name, got 'qwen'"):
        describe_preset("qwen")


def test_the_page_of_the_papers_size_shows_what_the_program_says(qwen: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper-scale.md").read_text(encoding="utf-8")
    assert page.split("```")[1].removeprefix("text").strip() == render_preset(qwen).strip()
