import math
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mars.checkpoint import codes_digest, load_image_tokenizer
from mars.config import from_dict, load_config, to_dict
from mars.data.shards import read_codes
from mars.errors import ConfigError
from mars.evaluation.config import EvaluationConfig
from mars.training.stages import STAGES, StageConfig
from mars.training.tokenizer_trainer import TokenizerTrainingConfig


def test_a_stage_survives_a_round_trip(stage: Callable[..., dict[str, Any]]) -> None:
    config = from_dict(StageConfig, stage())
    assert from_dict(StageConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"report_every": 0}, "report_every must be at least 1, got 0"),
        ({"sample_every": 0}, "sample_every must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"tasks": {"captioning": -0.1}}, r"tasks\.captioning must be at least 0 and finite, got -0\.1"),
        ({"tasks": {"captioning": math.nan}}, r"tasks\.captioning must be float, got nan"),
        ({"tasks": {"captioning": 0.0}}, "tasks must name at least one with a share above 0"),
        ({"tasks": {"painting": 1.0}}, r"unknown task tasks\.painting; known tasks are text_to_image, "),
        ({"data": {}}, r"data\.shards must name at least one code shard for tasks\.text_to_image, got none"),
        (
            {"data": {"shards": ["a", "b"], "repeats": [2]}},
            r"repeats must hold a number of at least 1 for each of 2 sh",
        ),
        ({"data": {"shards": ["a", "b"], "repeats": [2, 0]}}, r"for each of 2 shards, got \[2, 0\]"),
        ({"tasks": {"editing": 1.0}}, r"tasks\.editing learns documents: set data\.documents"),
        ({"stage": "align"}, "stage 'align' continues a model: set model.start_from"),
        ({"model": {}}, r"model\.image_tokenizer is required"),
        ({"model": {"start_from": "a", "semvie": {}}}, r"model\.semvie must be left out"),
        ({"guidance_dropout": 1.5}, "guidance_dropout must lie"),
        ({"batch": 3}, "unknown key batch; did you mean batch_size"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"stage": "finetune"}, "stage must be"),
    ],
)
def test_a_wrong_stage_is_one_line(stage: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(StageConfig, stage(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("matrix_rate", -0.1),
        ("clip", 0.0),
        ("weight_decay", -0.1),
        ("warmup", -1),
        ("decay", -1),
        ("betas", [0.9]),
        ("average", 1.0),
    ],
)
def test_a_wrong_optimizer_is_one_line(stage: Callable[..., dict[str, Any]], name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^optimizer.*{name}.* must"):
        from_dict(StageConfig, stage(optimizer={name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"learning_rate": math.inf}},
        {"optimizer": {"betas": [0.9, 1.5]}},
        {"special_weight": -1.0},
        {"top_rows": 0},
        {"accumulate": 0},
        {"keep": 0},
        {"max_skipped": 0},
        {"z_loss": -1e-4},
        {"peak_tflops": 0.0},
        {"data": {"shards": ["a"], "held_out": ["picture", "train"]}},
        {"prefix_gib": -1.0},
        {"threads": 0},
        {"threads": -2},
        {"sample_prompts": []},
        {"sample_prompts": ["red apple", " "]},
        {"seed": -1},
        {"seed": 2**32},
        {"data": {"shards": ["a"], "kinds": {"name": -1.0}}},
        {"data": {"shards": ["a"], "languages": {"en": -0.5, "zh": 1.0}}},
    ],
    ids=str,
)
def test_values_that_no_run_can_use_are_refused(stage: Callable[..., dict[str, Any]], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_dict(StageConfig, stage(**changes))


def test_shares_of_tasks_are_relative_and_the_stage_has_its_own(stage: Callable[..., dict[str, Any]]) -> None:
    asked = from_dict(StageConfig, stage(tasks={"captioning": 1.0, "text_to_image": 3.0, "top_rows": 0.0}))
    assert asked.mix == {"captioning": 0.25, "text_to_image": 0.75}
    table = stage(tasks={})
    assert from_dict(StageConfig, table).mix == STAGES["pretrain"].tasks
    table["model"] = {"start_from": "runs/a/model"}
    assert from_dict(StageConfig, table | {"stage": "align"}).mix == {"text_to_image": 1.0}


def test_a_stage_says_in_a_line_what_it_does(stage: Callable[..., dict[str, Any]]) -> None:
    line = from_dict(StageConfig, stage(tasks={}, optimizer={"decay": 7})).describe()
    words = ("pretrain: ", "a new visual expert on", "text_to_image 85%", "10 steps of 6", "decay over the last 7")
    assert all(word in line for word in words), line
    assert "\n" not in line


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_that_comes_along_loads(path: Path) -> None:
    stage = tomllib.loads(path.read_text("utf-8")).get("stage", "evaluation")
    kinds = {"tokenizer": TokenizerTrainingConfig, "evaluation": EvaluationConfig}
    load_config(kinds.get(stage, StageConfig), path)


def test_the_codes_that_come_along_are_those_of_the_image_tokenizer_that_does() -> None:
    config = load_config(StageConfig, ROOT / "configs" / "mini-pretrain.toml")
    assert config.model.image_tokenizer is not None
    tokenizer, _ = load_image_tokenizer(ROOT / config.model.image_tokenizer)
    for shard in config.data.shards:
        coded, digest = read_codes(ROOT / shard)
        assert digest == codes_digest(tokenizer)
        assert {item.record.split for item in coded} > {"train"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_configuration_at_the_scale_of_the_paper(stage: str) -> None:
    config = load_config(StageConfig, ROOT / "configs" / f"paper-{stage}.toml")
    assert config.stage == stage
    assert config.mix.keys() == STAGES[stage].tasks.keys()
    assert not STAGES[stage].needs_model or config.model.start_from is not None
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.warmup == config.steps // 100


def test_every_stage_continues_what_the_one_before_it_makes() -> None:
    stages = [load_config(StageConfig, ROOT / "configs" / f"paper-{stage}.toml") for stage in STAGES]
    for before, after in pairwise(stages):
        assert after.model.start_from == before.out / "model"
