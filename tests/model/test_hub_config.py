import math
from typing import Any

import pytest

from mars.errors import ModelError
from mars.model.config import RopeScaling
from mars.model.hub_config import hub_config
from mars.model.language_tensors import language_shapes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_what_an_old_config_leaves_out_has_llamas_defaults() -> None:
    config = hub_config(LLAMA, source="config.json")
    assert (config.num_kv_heads, config.head_width, config.rope_theta, config.norm_eps) == (
        4,
        8,
        10000.0,
        1e-6,
    )
    assert not config.tied_embeddings


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_the_rotary_base_stands_in_either_place(rope: dict[str, Any]) -> None:
    assert hub_config(LLAMA | rope, source="config.json").rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architecture must be one of .*, got MistralForCausalLM"),
        ({"architectures": None}, "got none"),
        ({"architectures": ["MistralForCausalLM"]}, "LlamaForCausalLM, .*QWenLMHeadModel .*Llama, SmolLM, Qwen 1 to 3"),
        ({"rope_scaling": {"type": "longrope"}}, "must be of type default, linear, dynamic, .*, got longrope"),
        ({"rope_scaling": {"type": "linear"}}, "config.json must give factor, got none"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "config.json must give low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be greater than 0, got 0.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be .*, got 0.5"),
        ({"use_sliding_window": True}, "use_sliding_window must be at its default, got true"),
        ({"mlp_bias": True}, "mlp_bias must be"),
        ({"hidden_act": "gelu"}, "hidden_act must be"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be"),
        ({"hidden_size": "wide"}, "config.json: "),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
    ],
)
def test_a_model_that_we_cannot_run_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        hub_config(LLAMA | changes, source="config.json")
    assert "\n" not in str(caught.value)


def test_a_missing_number_is_named() -> None:
    with pytest.raises(ModelError, match="must give hidden_size, got none"):
        hub_config({key: value for key, value in LLAMA.items() if key != "hidden_size"}, source="config.json")


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rope_type": "default"}, None),
        ({"type": "dynamic", "factor": 4.0}, None),
        ({"type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_type": "llama3"} | LLAMA3, RopeScaling(kind="llama3", factor=8.0, original_positions=64)),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.25},
            RopeScaling(kind="yarn", factor=4.0, original_positions=32, attention_factor=1.25),
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 32, "mscale": 2.0, "mscale_all_dim": 2.0},
            RopeScaling(kind="yarn", factor=4.0, original_positions=32, attention_factor=1.0),
        ),
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_read_from_either_place(place: str, fields: dict[str, Any], wanted: RopeScaling | None) -> None:
    assert hub_config(LLAMA | {place: fields}, source="config.json").rope_scaling == wanted


QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}
"""What Qwen-7B's config.json says of its shape."""


def test_qwen_7b_has_7_72_billion_parameters() -> None:
    config = hub_config(QWEN, source="config.json")
    assert (config.ffn, config.head_width, config.max_positions, config.qkv_bias) == (11008, 128, 8192, True)
    assert (config.rope_theta, config.norm_eps, config.num_kv_heads) == (1e4, 1e-6, 32)
    assert sum(math.prod(shape) for shape in language_shapes(config).values()) == 7_721_324_544


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "no_bias must be at its default, got false"),
        ({"rotary_pct": 0.25}, "rotary_pct must be at its default, got 0.25"),
        ({"kv_channels": 64}, r"kv_channels must be 128 \(hidden_size / num_attention_heads\), got 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be"),
    ],
)
def test_a_first_qwen_that_we_cannot_run_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        hub_config(QWEN | changes, source="config.json")
