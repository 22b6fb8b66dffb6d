import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mars.errors import ModelError
from mars.model.hub_folder import hub_config, is_whole, read_hub_tensors, read_json, read_tokenizer_config

Write = Callable[..., tuple[Path, dict[str, torch.Tensor]]]
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
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling must be at its default"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling must be at its default"),
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


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["adapter.weight"] = torch.zeros(1)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(8)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "must hold tensor model.norm.weight, got none"),
        (add, "holds tensor adapter.weight"),
        (reshape, r"must have shape \(32,\)"),
        (spoil, "model.norm.weight must be finite"),
        (quantize, "must hold fp32, fp16 or bf16, got torch.int8"),
    ],
)
def test_wrong_tensors_are_one_clear_line(write_hub_folder: Write, edit: Any, message: str) -> None:
    folder, _ = write_hub_folder()
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = hub_config(read_json(folder / "config.json"), source="config.json")
    with pytest.raises(ModelError, match=message):
        read_hub_tensors(folder, config)


def test_missing_and_damaged_files_are_one_clear_line(write_hub_folder: Write) -> None:
    folder, _ = write_hub_folder(shard_size="10KB")
    config = hub_config(read_json(folder / "config.json"), source="config.json")
    shard = min(folder.glob("model-*.safetensors"))
    assert is_whole(folder)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="must be a whole safetensors file"):
        read_hub_tensors(folder, config)
    shard.unlink()
    assert not is_whole(folder)
    with pytest.raises(ModelError, match=f"must hold {shard.name}, got none"):
        read_hub_tensors(folder, config)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="must hold a weight_map"):
        read_hub_tensors(folder, config)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        read_hub_tensors(folder, config)
    (folder / "config.json").write_text("not JSON")
    with pytest.raises(ModelError, match="must be a JSON file"):
        read_json(folder / "config.json")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        read_json(folder / "config.json")


def test_control_tokens_come_from_the_tokenizer_else_from_the_model(write_hub_folder: Write) -> None:
    folder, _ = write_hub_folder()
    assert read_tokenizer_config(folder) == {"bos_token_id": 1, "eos_token_id": 2, "chat_template": None}
    settings = {
        "bos_token": None,
        "eos_token": {"content": "<|endoftext|>"},
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer_config(folder) == {"bos_token_id": 1, "eos_token_id": 0, "chat_template": "d"}
    (folder / "chat_template.jinja").write_text("j")
    assert read_tokenizer_config(folder)["chat_template"] == "j"


@pytest.mark.parametrize(
    "table", [{"added_tokens": [{"id": 1}]}, {"added_tokens": 3}, {"model": {"vocab": [["a", 0]]}}]
)
def test_a_tokenizer_that_does_not_list_its_tokens_is_one_line(write_hub_folder: Write, table: dict[str, Any]) -> None:
    folder, _ = write_hub_folder()
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match=r"tokenizer.json must list its tokens"):
        read_tokenizer_config(folder)
