from typing import Any

import pytest

from mars.config import from_dict, to_dict
from mars.errors import ConfigError
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig, UpscaleConfig

LANGUAGE: dict[str, Any] = {
    "vocab_size": 21,
    "width": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "ffn": 48,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
    "max_positions": 64,
    "tied_embeddings": True,
}


def model(*, num_codes: int = 13, **semvie: Any) -> ModelConfig:
    return ModelConfig(language=LanguageConfig(**LANGUAGE), semvie=SemVIEConfig(**semvie), num_codes=num_codes)


def test_the_visual_side_has_the_language_models_shape_unless_told() -> None:
    config = model()
    assert (config.visual_width, config.visual_ffn, config.visual_layers) == (32, 48, (0, 1, 2))
    narrow = model(share_norms=False, init="random", visual_width=16, visual_ffn=24, visual_layers=(2, 0))
    assert (narrow.visual_width, narrow.visual_ffn, narrow.visual_layers) == (16, 24, (0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "language.width must be greater than 0, got 0"),
        ({"rope_theta": -1.0}, "language.rope_theta must be greater than 0, got -1.0"),
        ({"rope_theta": float("nan")}, "language.rope_theta must be greater than 0, got nan"),
        ({"num_kv_heads": 3}, "language.num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_width": 7}, "language.head_width must be even for rotary positions, got 7"),
    ],
)
def test_a_bad_language_model_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LanguageConfig(**(LANGUAGE | change))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codes": 0}, "model.num_codes must be greater than 0"),
        ({"init": "zeros"}, "semvie.init must be 'copy' or 'random', got 'zeros'"),
        ({"visual_width": 0}, "semvie.visual_width must be greater than 0, got 0"),
        ({"visual_ffn": -5}, "semvie.visual_ffn must be greater than 0, got -5"),
        ({"max_grid": 0}, "semvie.max_grid must be greater than 0, got 0"),
        ({"visual_layers": ()}, "semvie.visual_layers must name at least one layer"),
        ({"visual_layers": (0, 3)}, "semvie.visual_layers must lie in 0..2, got 3"),
        ({"visual_layers": (-1,)}, "semvie.visual_layers must lie in 0..2, got -1"),
        ({"visual_width": 16}, "semvie.share_norms needs visual_width 32"),
        ({"visual_width": 16, "share_norms": False}, "semvie.init = 'copy' needs the LLM's widths"),
        ({"visual_ffn": 24}, "semvie.init = 'copy' needs the LLM's widths"),
        (
            {"visual_width": 16, "share_norms": False, "init": "random", "duplicate_output": False},
            "semvie.duplicate_output = false needs visual_width 32",
        ),
    ],
)
def test_a_bad_visual_expert_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [model(), model(share_norms=False, init="random", visual_width=16, visual_ffn=8, visual_layers=(1,))]
)
def test_a_config_survives_json(config: ModelConfig) -> None:
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_upscaling_draws_a_grid_some_times_larger_in_square_blocks() -> None:
    how = UpscaleConfig(scale=3, codes_per_step=16)
    assert (how.side, how.high((2, 5))) == (4, (6, 15))
    assert how.text([(2, 5), (3, 3)], factor=16) == "80x32 to 240x96, 48x48 to 144x144; 16 codes a step"
    for wrong, message in (({"scale": 1}, "scale must be at least 2, got 1"), ({"codes_per_step": 0}, "got 0")):
        with pytest.raises(ConfigError, match=message):
            UpscaleConfig(**wrong)


def test_what_was_saved_before_super_resolution_still_reads() -> None:
    table = to_dict(model())
    del table["semvie"]["low_input"]
    assert from_dict(ModelConfig, table) == model()
