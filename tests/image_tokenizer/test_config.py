from typing import Any

import pytest

from mars.config import from_dict, to_dict
from mars.errors import ConfigError
from mars.image_tokenizer.config import ImageTokenizerConfig


@pytest.mark.parametrize(
    ("change", "factor"),
    [({}, 16), ({"channels": (32,)}, 1), ({"channels": (32, 64)}, 2), ({"channels": (32, 64), "patch": 4}, 8)],
)
def test_the_factor_counts_the_pixels_on_a_side_of_a_code(change: dict[str, Any], factor: int) -> None:
    assert ImageTokenizerConfig(**change).factor == factor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codes": 0}, "image_tokenizer.num_codes must be at least 1, got 0"),
        ({"patch": -1}, "image_tokenizer.patch must be at least 1, got -1"),
        ({"channels": ()}, "image_tokenizer.channels must be multiples of norm_groups 32, got []"),
        ({"channels": (32, 48)}, "image_tokenizer.channels must be multiples of norm_groups 32, got [32, 48]"),
        ({"channels": (0, 32)}, "image_tokenizer.channels must be multiples of norm_groups 32, got [0, 32]"),
        ({"attention_levels": (5,)}, "image_tokenizer.attention_levels must lie in 0..4, got 5"),
        ({"code_choice": "near"}, "image_tokenizer.code_choice must be one of l2, cosine, dot, lfq, got 'near'"),
        ({"code_choice": "lfq"}, "image_tokenizer.num_codes must be 2 ** code_width for lfq, got 8192 and 64"),
        ({"pixel_range": (1.0, 0.0)}, "image_tokenizer.pixel_range must rise, got [1.0, 0.0]"),
    ],
)
def test_a_bad_image_tokenizer_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageTokenizerConfig(**change)
    assert str(caught.value) == message


def test_a_config_survives_json() -> None:
    config = ImageTokenizerConfig(channels=(32, 64), attention_levels=(1,), pixel_range=(0.0, 1.0))
    assert from_dict(ImageTokenizerConfig, to_dict(config)) == config
