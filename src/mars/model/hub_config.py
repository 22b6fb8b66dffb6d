"""The config.json of an LLM in the hub's layout, turned into our configuration; what we cannot run is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mars.errors import ConfigError, ModelError
from mars.model.config import LanguageConfig, RopeScaling
from mars.model.language_tensors import HUB, HUB_QWEN, Layout

LAYOUTS: Mapping[str, Layout] = {
    "LlamaForCausalLM": HUB,
    "Qwen2ForCausalLM": HUB,
    "Qwen3ForCausalLM": HUB,
    "QWenLMHeadModel": HUB_QWEN,
}
"""The architectures that we run, and how their files name tensors."""


def hub_architecture(fields: Mapping[str, Any], *, source: str) -> str:
    """The architecture that a config.json names; ModelError unless it is one of `LAYOUTS`."""
    named = fields.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "none"
    if architecture not in LAYOUTS:
        raise ModelError(
            f"{source}: architecture must be one of {', '.join(LAYOUTS)} (Llama, SmolLM, Qwen 1 to 3), "
            f"got {architecture}; use another model"
        )
    return str(architecture)


def hub_config(fields: Mapping[str, Any], *, source: str) -> LanguageConfig:
    """The shapes that a hub `config.json` describes; ModelError for what we cannot run."""
    read = _qwen if hub_architecture(fields, source=source) == "QWenLMHeadModel" else _llama
    try:
        return read(fields, source)
    except KeyError as error:
        raise ModelError(f"{source} must give {error.args[0]}, got none") from error
    except (TypeError, ValueError, ArithmeticError, ConfigError) as error:
        raise ModelError(f"{source}: {error}") from error


def _refuse(fields: Mapping[str, Any], wrong: Mapping[str, bool], source: str) -> None:
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ModelError(
            f"{source}: {name} must be at its default, got {json.dumps(fields.get(name))}; use another model"
        )


def _llama(fields: Mapping[str, Any], source: str) -> LanguageConfig:
    architecture = hub_architecture(fields, source=source)
    rope = fields.get("rope_parameters") or {}
    fields = {"partial_rotary_factor": rope.get("partial_rotary_factor", 1.0), **fields}
    wrong = {
        "partial_rotary_factor": float(fields["partial_rotary_factor"]) != 1.0,
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "quantization_config": bool(fields.get("quantization_config")),
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
    }
    _refuse(fields, wrong, source)
    heads, width = int(fields["num_attention_heads"]), int(fields["hidden_size"])
    positions = int(fields["max_position_embeddings"])
    return LanguageConfig(
        vocab_size=int(fields["vocab_size"]),
        width=width,
        num_layers=int(fields["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_width=int(fields.get("head_dim") or width // heads),
        ffn=int(fields["intermediate_size"]),
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        max_positions=positions,
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        rope_scaling=_rope_scaling(fields.get("rope_scaling") or rope, positions=positions, source=source),
    )


def _rope_scaling(fields: Mapping[str, Any], *, positions: int, source: str) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    original = int(fields.get("original_max_position_embeddings") or positions)
    match kind:
        case "default" | "dynamic":
            # `dynamic` changes nothing up to max_position_embeddings, and we go no further.
            return None
        case "linear":
            return RopeScaling(kind="linear", factor=float(fields["factor"]))
        case "llama3":
            return RopeScaling(
                kind="llama3",
                factor=float(fields["factor"]),
                original_positions=original,
                low_frequency=float(fields["low_freq_factor"]),
                high_frequency=float(fields["high_freq_factor"]),
            )
        case "yarn":
            factor = float(fields.get("factor") or positions / original)
            return RopeScaling(
                kind="yarn",
                factor=factor,
                original_positions=original,
                beta_fast=float(fields.get("beta_fast") or 32),
                beta_slow=float(fields.get("beta_slow") or 1),
                truncate=bool(fields.get("truncate", True)),
                attention_factor=_yarn_attention(fields, factor=factor),
            )
    raise ModelError(
        f"{source}: rope_scaling must be of type default, linear, dynamic, llama3 or yarn, got {kind}; "
        "use another model"
    )


def _yarn_attention(fields: Mapping[str, Any], *, factor: float) -> float:
    """Peng et al. 2023, equation 22; with `mscale` and `mscale_all_dim`, as `transformers` does it."""
    given, part, whole = (fields.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if part and whole:
        return yarn_attention(factor, slope=0.1 * float(part)) / yarn_attention(factor, slope=0.1 * float(whole))
    return yarn_attention(factor)


def yarn_attention(factor: float, *, slope: float = 0.1) -> float:
    """What YaRN multiplies cosines and sines by: slope * ln(factor) + 1 (Peng et al. 2023, equation 22)."""
    return slope * math.log(factor) + 1 if factor > 1 else 1.0


def _qwen(fields: Mapping[str, Any], source: str) -> LanguageConfig:
    """The first generation of Qwen, by its published configuration_qwen.py and modeling_qwen.py."""
    wrong = {
        "no_bias": not fields.get("no_bias", True),
        "rotary_pct": float(fields.get("rotary_pct", 1.0)) != 1.0,
        "quantization_config": bool(fields.get("quantization_config")),
    }
    _refuse(fields, wrong, source)
    heads, width = int(fields["num_attention_heads"]), int(fields["hidden_size"])
    head_width = int(fields.get("kv_channels") or width // heads)
    if heads * head_width != width:
        raise ConfigError(f"kv_channels must be {width // heads} (hidden_size / num_attention_heads), got {head_width}")
    positions = fields.get("max_position_embeddings") or fields["seq_length"]
    return LanguageConfig(
        vocab_size=int(fields["vocab_size"]),
        width=width,
        num_layers=int(fields["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_width=head_width,
        ffn=int(fields["intermediate_size"]) // 2,  # w1 and w2 together
        rope_theta=float(fields.get("rotary_emb_base", 10000.0)),
        norm_eps=float(fields.get("layer_norm_epsilon", 1e-6)),
        # use_dynamic_ntk and use_logn_attn change what lies beyond seq_length, and we go no further.
        max_positions=min(int(positions), int(fields.get("seq_length") or positions)),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=True,
    )
