"""An opened LLM, written in the hub's layout, so that a model's folder can hold all that it needs."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mars.errors import ModelError
from mars.model.base_llm import BaseLLM
from mars.model.config import LanguageConfig, RopeScaling
from mars.model.language_tensors import hub_name

SHARD = 5_000_000_000
"""Most bytes of one file of weights, unless a single tensor has more."""


def save_language(llm: BaseLLM, folder: Path) -> None:
    """Writes config.json, safetensors (in shards), tokenizer.json and a chat template into an existing folder.

    Raises:
        ModelError: if the hub's layout has no word for what the LLM does.
        OSError: if a file cannot be written.
    """
    settings = llm.tokenizer_config
    fields = hub_fields(llm.config) | {name: settings.get(name) for name in ("bos_token_id", "eos_token_id")}
    fields["torch_dtype"] = str(next(iter(llm.tensors.values())).dtype).removeprefix("torch.")
    _write(folder / "config.json", fields)
    _save_weights({hub_name(name): tensor for name, tensor in llm.tensors.items()}, folder)
    shutil.copyfile(llm.tokenizer, folder / "tokenizer.json")
    if settings.get("chat_template"):
        (folder / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")


def _save_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """One file, or several and an index. Not by the hub's own client, which refuses tensors that are parts of one."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes + sum(other.nbytes for other in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk too
            raise OSError(str(error)) from error
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors makes files their owner's alone


def hub_fields(config: LanguageConfig) -> dict[str, Any]:
    """The hub's config.json of an LLM's shapes; `hub_config` turns it back.

    Raises:
        ModelError: for shapes that no supported architecture has.
    """
    match (config.qkv_bias, config.qk_norm):
        case (False, False):
            architecture = "LlamaForCausalLM"
        case (True, False):
            architecture = "Qwen2ForCausalLM"
        case (False, True):
            architecture = "Qwen3ForCausalLM"
        case _:
            raise ModelError(
                "an LLM with both biases and norms of queries has no layout on the hub; keep its own folder"
            )
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope_fields(config.rope_scaling)
    return fields


def _rope_fields(scaling: RopeScaling) -> Mapping[str, Any]:
    common = {"rope_type": scaling.kind, "factor": scaling.factor}
    match scaling.kind:
        case "linear":
            return common
        case "llama3":
            return common | {
                "original_max_position_embeddings": scaling.original_positions,
                "low_freq_factor": scaling.low_frequency,
                "high_freq_factor": scaling.high_frequency,
            }
        case "yarn":
            return common | {
                "original_max_position_embeddings": scaling.original_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
            }
    raise ModelError("an LLM whose frequencies have factors of their own has no layout on the hub; keep its GGUF file")


def _write(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
