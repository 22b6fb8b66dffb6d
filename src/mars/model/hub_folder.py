"""An LLM in the hub's layout: a folder with config.json, safetensors and tokenizer.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mars.errors import ConfigError, ModelError
from mars.model.config import LanguageConfig
from mars.model.language_tensors import check_shapes, hub_name, language_shapes

_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError when it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} must hold {path.name}, got none; a language model needs it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be a JSON file, got: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def hub_config(fields: Mapping[str, Any], *, source: str) -> LanguageConfig:
    """The shapes that a hub `config.json` describes; ModelError for what we cannot run."""
    architecture = (fields.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise ModelError(f"{source}: architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture}")
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or rope
    wrong = {
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
        "partial_rotary_factor": float(rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)))
        != 1.0,
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        "quantization_config": bool(fields.get("quantization_config")),
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ModelError(
            f"{source}: {name} must be at its default, got {json.dumps(fields.get(name, scaling))}; use another model"
        )
    try:
        heads, width = int(fields["num_attention_heads"]), int(fields["hidden_size"])
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
            max_positions=int(fields["max_position_embeddings"]),
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
        )
    except KeyError as error:
        raise ModelError(f"{source} must give {error.args[0]}, got none") from error
    except (TypeError, ValueError, ZeroDivisionError, ConfigError) as error:
        raise ModelError(f"{source}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise ModelError(f"{folder} must hold {_WEIGHTS} or {_INDEX}, got neither; only safetensors weights are read")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX} must hold a weight_map, got none")
    return [folder / Path(name).name for name in sorted({str(name) for name in weight_map.values()})]


def is_whole(folder: Path) -> bool:
    """Whether every file that we read is there."""
    try:
        files = _weight_files(folder)
    except ModelError:
        return False
    return all(path.is_file() for path in (folder / "config.json", folder / "tokenizer.json", *files))


def _read(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, file.get_tensor(name)
        except FileNotFoundError:
            raise ModelError(f"{path.parent} must hold {path.name}, got none; the model is incomplete") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} must be a whole safetensors file, got: {error}; download it again") from error


def read_hub_tensors(folder: Path, config: LanguageConfig) -> dict[str, torch.Tensor]:
    """The tensors under our names in fp32: memory-mapped if they are stored so, else converted."""
    expected = {hub_name(name): (name, shape) for name, shape in language_shapes(config).items()}
    found = {
        name: tensor
        for name, tensor in _read(_weight_files(folder))
        if not name.endswith("rotary_emb.inv_freq") and not (config.tied_embeddings and name == "lm_head.weight")
    }
    check_shapes(
        {name: tensor.shape for name, tensor in found.items()},
        expected={name: shape for name, (_, shape) in expected.items()},
        source=str(folder),
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, (ours, _) in expected.items():
        tensor = found.pop(name)
        if not tensor.is_floating_point():
            raise ModelError(
                f"{folder}: tensor {name} must hold fp32, fp16 or bf16, got {tensor.dtype}; use another file"
            )
        tensors[ours] = tensor.to(torch.float32)
        if not torch.isfinite(tensors[ours].sum()):
            raise ModelError(f"{folder}: tensor {name} must be finite, got NaN or infinity; the file is damaged")
    return tensors


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (int or None) and `chat_template` (str or None) of a hub folder."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model = read_json(folder / "config.json")
    tokenizer = read_json(folder / "tokenizer.json")
    try:
        ids = {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or []}
        ids = {**(tokenizer.get("model") or {}).get("vocab", {}), **ids}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'tokenizer.json'} must list its tokens, got: {error!r}; use another model"
        ) from error

    def token_id(kind: str) -> int | None:
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            return int(ids[text])
        fallback = model.get(f"{kind}_token_id")
        first = fallback[0] if isinstance(fallback, list) and fallback else fallback
        return first if isinstance(first, int) else None

    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {"bos_token_id": token_id("bos"), "eos_token_id": token_id("eos"), "chat_template": template}
