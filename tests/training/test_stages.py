import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mars.checkpoint import codes_digest, load_image_tokenizer
from mars.config import from_dict, load_config, to_dict
from mars.data.shards import read_codes
from mars.errors import ConfigError
from mars.training.stages import StageConfig
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
        ({"captioning": 1.0}, r"captioning must lie in 0\.\.1, got 1\.0"),
        ({"captioning": -0.1}, "captioning must lie"),
        ({"captioning": math.nan}, "captioning must be float, got nan"),
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
        {"top_rows": -1},
        {"top_rows_share": 1.0},
        {"prefix_gib": -1.0},
        {"threads": 0},
        {"threads": -2},
        {"sample_prompts": []},
        {"sample_prompts": ["red apple", " "]},
        {"seed": -1},
        {"seed": 2**32},
        {"data": {"shards": []}},
        {"data": {"shards": ["a"], "kinds": {"name": -1.0}}},
        {"data": {"shards": ["a"], "languages": {"en": -0.5, "zh": 1.0}}},
    ],
    ids=str,
)
def test_values_that_no_run_can_use_are_refused(stage: Callable[..., dict[str, Any]], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_dict(StageConfig, stage(**changes))


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_that_comes_along_loads(path: Path) -> None:
    stage = tomllib.loads(path.read_text("utf-8"))["stage"]
    load_config(TokenizerTrainingConfig if stage == "tokenizer" else StageConfig, path)


def test_the_codes_that_come_along_are_those_of_the_image_tokenizer_that_does() -> None:
    config = load_config(StageConfig, ROOT / "configs" / "mini-pretrain.toml")
    tokenizer, _ = load_image_tokenizer(ROOT / config.model.image_tokenizer)
    for shard in config.data.shards:
        coded, digest = read_codes(ROOT / shard)
        assert digest == codes_digest(tokenizer)
        assert {item.record.split for item in coded} > {"train"}
