from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file

from mars.errors import ModelError
from mars.model.config import LanguageConfig
from mars.model.gguf import convert_gguf

Write = Callable[..., tuple[Path, dict[str, np.ndarray]]]


def convert(path: Path) -> tuple[LanguageConfig, dict[str, np.ndarray]]:
    converted = convert_gguf(path, tensors=path.with_name("t.safetensors"), tokenizer=path.with_name("t.json"))
    return converted.config, load_file(path.with_name("t.safetensors"))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_tensors_come_back_in_rotate_half_order(
    write_gguf: Write, tiny_config: LanguageConfig, quantization: str
) -> None:
    path, expected = write_gguf(quantization=GGMLQuantizationType[quantization])
    config, tensors = convert(path)
    assert config == tiny_config
    assert_equal(tensors, expected)


@pytest.mark.parametrize(("architecture", "options"), [("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})])
def test_qwen_is_not_permuted(
    write_gguf: Write, tiny_config: LanguageConfig, architecture: str, options: dict[str, bool]
) -> None:
    expected_config = replace(tiny_config, tied_embeddings=False, **options)
    path, expected = write_gguf(architecture=architecture, config=expected_config)
    config, tensors = convert(path)
    assert config == expected_config
    assert_equal(tensors, expected)


def remove(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors[name]

    return edit


def put(name: str, values: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: values})


NAN = np.full((32,), np.nan, dtype=np.float32)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architecture": "gemma"},
        "must be one of llama, qwen2, qwen3, got 'gemma'",
    ),
    "missing tensor": (
        {"edit": remove("output_norm.weight")},
        "must hold tensor output_norm.weight",
    ),
    "no embedding": ({"edit": remove("token_embd.weight")}, "must hold tensor token_embd.weight"),
    "extra tensor": (
        {"edit": put("blk.0.ffn_gate_exps.weight", NAN)},
        "holds tensor blk.0.ffn_gate_exps",
    ),
    "shape": ({"edit": put("output_norm.weight", NAN[:8])}, r"must have shape \(32,\)"),
    "not finite": ({"edit": put("output_norm.weight", NAN)}, "output_norm.weight must be finite"),
    "rope scaling": (
        {"metadata": {"llama.rope.scaling.type": "yarn"}},
        "must be absent, got yarn",
    ),
    "rope factors": (
        {"edit": put("rope_freqs.weight", NAN)},
        "must be absent, got rope_freqs",
    ),
    "partial rope": ({"metadata": {"llama.rope.dimension_count": 4}}, "8 channels must all rotate, got 4"),
    "no width": (
        {"metadata": {"llama.embedding_length": None}},
        "must give llama.embedding_length",
    ),
    "no heads": ({"metadata": {"llama.attention.head_count": 0}}, "tiny.gguf: "),
    "text for a number": ({"metadata": {"llama.block_count": "two"}}, "tiny.gguf: .*'two'"),
    "layers": ({"metadata": {"llama.block_count": 2**31}}, "must hold 2147483648 layers, got 20 tensors"),
    "no tokens": ({"metadata": {"tokenizer.ggml.tokens": None}}, "must give tokenizer.ggml.tokens"),
    "tokenizer": ({"metadata": {"tokenizer.ggml.model": "llama"}}, "must be of kind 'gpt2'"),
    "split": (
        {"metadata": {"tokenizer.ggml.pre": "tekken"}},
        "pre must be one of gpt-2, smollm",
    ),
    "merges": ({"metadata": {"tokenizer.ggml.merges": ["zz q"]}}, "tokens and merges do not fit together"),
    "types": (
        {"metadata": {"tokenizer.ggml.token_type": [1, 1]}},
        "have a type, got 264 and 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_we_cannot_use_is_one_clear_line(write_gguf: Write, case: str) -> None:
    changes, message = WRONG[case]
    path, _ = write_gguf(**changes)
    with pytest.raises(ModelError, match=message) as caught:
        convert(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [8, 30, 200, 3000, -1000, -1])
def test_a_truncated_file_is_one_clear_line(write_gguf: Write, kept: int) -> None:
    path, _ = write_gguf()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="must be a whole GGUF file") as caught:
        convert(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_string_is_one_clear_line(write_gguf: Write) -> None:
    path, _ = write_gguf()
    path.write_bytes(path.read_bytes().replace(b"smollm", b"smo\xff\xffm"))
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre must be valid UTF-8"):
        convert(path)
