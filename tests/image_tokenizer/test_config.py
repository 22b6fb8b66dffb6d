from dataclasses import replace
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
        ({"norm": "batch"}, "image_tokenizer.norm must be one of group, place, got 'batch'"),
        ({"code_choice": "near"}, "image_tokenizer.code_choice must be one of l2, cosine, dot, lfq, got 'near'"),
        ({"code_choice": "lfq"}, "image_tokenizer.num_codes must be 2 ** code_width for lfq, got 8192 and 64"),
        ({"latent_channels": 0}, "image_tokenizer.latent_channels must be at least 1, got 0"),
        (
            {"decoder_channels": (48,) * 5},
            f"image_tokenizer.decoder_channels must be multiples of norm_groups 32, got {[48] * 5}",
        ),
        ({"decoder_channels": (32,)}, "image_tokenizer.decoder_channels must have 5 values as channels has, got 1"),
        (
            {"blocks_per_level": 0},
            "image_tokenizer.blocks_per_level must be at least 1, one number or 5 (as channels has), got 0",
        ),
        (
            {"blocks_per_level": (1, 2)},
            "image_tokenizer.blocks_per_level must be at least 1, one number or 5 (as channels has), got [1, 2]",
        ),
        (
            {"decoder_blocks": (1, 1, 0, 1, 1)},
            "image_tokenizer.decoder_blocks must be at least 1, one number or 5 (as channels has), got [1, 1, 0, 1, 1]",
        ),
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
    uneven = replace(config, blocks_per_level=(1, 2), decoder_channels=(64, 64), decoder_blocks=3, latent_channels=8)
    assert from_dict(ImageTokenizerConfig, to_dict(uneven)) == uneven


def test_the_decoder_is_one_block_deeper_than_the_encoder_unless_it_says_more() -> None:
    config = ImageTokenizerConfig(channels=(32, 64), blocks_per_level=(1, 3))
    assert (config.down_blocks, config.up_blocks, config.up_channels, config.latent) == ((1, 3), (2, 4), (32, 64), 64)
    other = replace(config, decoder_blocks=2, decoder_channels=(64, 96), latent_channels=5)
    assert (other.down_blocks, other.up_blocks, other.up_channels, other.latent) == ((1, 3), (2, 2), (64, 96), 5)


def test_a_config_written_before_decoders_had_their_own_sizes_still_loads() -> None:
    table = to_dict(ImageTokenizerConfig())
    for name in ("latent_channels", "decoder_channels", "decoder_blocks"):
        assert table.pop(name) is None
    assert from_dict(ImageTokenizerConfig, table) == ImageTokenizerConfig()
