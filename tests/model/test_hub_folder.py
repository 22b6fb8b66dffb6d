import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mars.errors import ModelError
from mars.model.hub_config import hub_config
from mars.model.hub_folder import is_whole, read_hub_tensors, read_json, read_tokenizer_config
from mars.model.language_tensors import hub_name

Write = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


def read_config(folder: Path) -> dict[str, Any]:
    return read_tokenizer_config(folder, tokenizer=folder / "tokenizer.json", rows=264)


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
        (quantize, "must hold fp32, fp16 or bf16, got I8"),
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
    assert read_config(folder) == {"bos_token_id": 1, "eos_token_id": 2, "chat_template": None}
    settings = {
        "bos_token": None,
        "eos_token": {"content": "<|endoftext|>"},
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_config(folder) == {"bos_token_id": 1, "eos_token_id": 0, "chat_template": "d"}
    (folder / "chat_template.jinja").write_text("j")
    assert read_config(folder)["chat_template"] == "j"


@pytest.mark.parametrize(
    "table", [{"added_tokens": [{"id": 1}]}, {"added_tokens": 3}, {"model": {"vocab": [["a", 0]]}}]
)
def test_a_tokenizer_that_does_not_list_its_tokens_is_one_line(write_hub_folder: Write, table: dict[str, Any]) -> None:
    folder, _ = write_hub_folder()
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match=r"tokenizer.json must list its tokens"):
        read_config(folder)


def test_a_tokenizer_of_more_tokens_than_rows_is_one_line(write_hub_folder: Write) -> None:
    folder, _ = write_hub_folder()
    with pytest.raises(ModelError, match="must have a row of the embedding table, got ids up to 260 and 260 rows"):
        read_tokenizer_config(folder, tokenizer=folder / "tokenizer.json", rows=260)


def invent(index: dict[str, str]) -> None:
    index["model.ghost.weight"] = min(index.values())


def move(index: dict[str, str]) -> None:
    index["model.norm.weight"] = min(index.values())


def forget(index: dict[str, str]) -> None:
    del index["model.norm.weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (invent, "names tensor model.ghost.weight in model-00001-of-"),
        (move, "names tensor model.norm.weight in model-00001-of-"),
        (forget, "holds tensor model.norm.weight, which model.safetensors.index.json does not name"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_one_line(
    write_hub_folder: Write, edit: Callable[[dict[str, str]], None], message: str
) -> None:
    folder, _ = write_hub_folder(shard_size="40KB")
    path = folder / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    assert table["weight_map"]["model.norm.weight"] != min(table["weight_map"].values())
    edit(table["weight_map"])
    path.write_text(json.dumps(table))
    config = hub_config(read_json(folder / "config.json"), source="config.json")
    with pytest.raises(ModelError, match=message) as caught:
        read_hub_tensors(folder, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_kept_in_the_dtype_asked_for(
    write_hub_folder: Write, stored: torch.dtype, kept: torch.dtype
) -> None:
    folder, state = write_hub_folder(dtype=stored)
    config = hub_config(read_json(folder / "config.json"), source="config.json")
    for name, tensor in read_hub_tensors(folder, config, dtype=kept).items():
        assert tensor.dtype == kept
        assert torch.equal(tensor, state[hub_name(name)].to(kept)), name


def test_numbers_too_large_for_fp16_are_named(write_hub_folder: Write) -> None:
    folder, _ = write_hub_folder()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    config = hub_config(read_json(folder / "config.json"), source="config.json")
    with pytest.raises(ModelError, match=r"norm.weight must be finite, .*or its F32 numbers are too large for fp16"):
        read_hub_tensors(folder, config, dtype=torch.float16)
