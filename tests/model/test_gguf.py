import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import load_file

from mars.errors import ModelError
from mars.model.config import LanguageConfig, RopeScaling
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


@pytest.mark.parametrize("quantization", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("architecture", ["llama", "qwen"])
def test_blocks_of_256_come_back_too(
    write_gguf: Write, tiny_config: LanguageConfig, architecture: str, quantization: str
) -> None:
    wide = replace(tiny_config, width=256, ffn=256, head_width=64, num_layers=1, qkv_bias=architecture == "qwen")
    config = replace(wide, num_kv_heads=4 if architecture == "qwen" else 2)
    path, expected = write_gguf(
        architecture=architecture, config=config, quantization=GGMLQuantizationType[quantization]
    )
    found, tensors = convert(path)
    assert found == config
    assert_equal(tensors, expected)
    assert len(np.unique(expected["layers.0.language.q_proj.weight"])) > 100


def test_q4_k_is_what_its_layout_says() -> None:
    """ggml-common.h: d and dmin (fp16), 8 six-bit scales and minima in 12 bytes, 256 four-bit numbers."""
    raw = np.random.default_rng(0).integers(0, 256, (3, 144), dtype=np.uint8)
    raw[:, :4] = np.full((3, 2), 0.01, dtype=np.float16).view(np.uint8)
    values = dequantize(raw, GGMLQuantizationType.Q4_K)
    for row, block in enumerate(raw.astype(int)):
        s, q, d = block[4:16], block[16:], float(np.float16(0.01))
        for index in range(256):
            group = index // 32
            if group < 4:
                scale, minimum = s[group] & 63, s[group + 4] & 63
            else:
                scale = (s[group + 4] & 15) | (s[group - 4] >> 6 << 4)
                minimum = (s[group + 4] >> 4) | (s[group] >> 6 << 4)
            number = q[index // 64 * 32 + index % 32] >> (4 * (group % 2)) & 15
            assert values[row, index] == pytest.approx(d * scale * number - d * minimum, abs=1e-4)


def test_q6_k_is_what_its_layout_says() -> None:
    """ggml-common.h: low four bits, high two bits, 16 scales of eight bits, d (fp16)."""
    raw = np.random.default_rng(0).integers(0, 256, (3, 210), dtype=np.uint8)
    raw[:, 208:] = np.full((3, 1), 0.01, dtype=np.float16).view(np.uint8)
    values = dequantize(raw, GGMLQuantizationType.Q6_K)
    for row, block in enumerate(raw.astype(int)):
        low, high, scales = block[:128], block[128:192], raw[row, 192:208].view(np.int8)
        for index in range(256):
            half, quarter, place = index // 128, index % 128 // 32, index % 32
            nibble = low[half * 64 + quarter % 2 * 32 + place] >> (4 * (quarter // 2)) & 15
            number = (nibble | (high[half * 32 + place] >> (2 * quarter) & 3) << 4) - 32
            wanted = float(np.float16(0.01)) * int(scales[index // 16]) * number
            assert values[row, index] == pytest.approx(wanted, abs=1e-4)


def test_a_first_qwen_keeps_its_fused_projections_apart(write_gguf: Write, tiny_config: LanguageConfig) -> None:
    config = replace(tiny_config, num_kv_heads=4, qkv_bias=True, tied_embeddings=False)
    path, expected = write_gguf(architecture="qwen", config=config, metadata={"tokenizer.ggml.pre": None})
    found, tensors = convert(path)
    assert found == config
    assert_equal(tensors, expected)


FACTORS = np.array([1.0, 1.0, 3.5, 8.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"metadata": {"llama.rope.scaling.type": "none"}}, None),
        ({"metadata": {"llama.rope.scaling.factor": 1.0}}, None),
        ({"metadata": {"llama.rope.scaling.factor": 2.5}}, RopeScaling(kind="linear", factor=2.5)),
        ({"metadata": {"llama.rope.scale_linear": 2.0}}, RopeScaling(kind="linear", factor=2.0)),
        (
            {"metadata": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
            RopeScaling(kind="yarn", factor=4.0, original_positions=128, attention_factor=0.1 * math.log(4) + 1),
        ),
        (
            {
                "metadata": {
                    "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
                    "llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.attn_factor": 1.5,
                    "llama.rope.scaling.yarn_beta_fast": 16.0,
                }
            },
            RopeScaling(
                kind="yarn", factor=2.0, original_positions=64, attention_factor=1.5 * (0.1 * math.log(2) + 1),
                beta_fast=16.0,
            ),
        ),
        (
            {"edit": lambda tensors: tensors.update({"rope_freqs.weight": FACTORS})},
            RopeScaling(kind="factors", factors=(1.0, 1.0, 3.5, 8.0)),
        ),
    ],
)  # fmt: skip
def test_rope_scaling_is_read_as_llama_cpp_reads_it(
    write_gguf: Write, changes: dict[str, Any], scaling: RopeScaling | None
) -> None:
    path, expected = write_gguf(**changes)
    config, tensors = convert(path)
    assert config.rope_scaling == scaling
    assert_equal(tensors, expected)


@pytest.mark.parametrize(("architecture", "options"), [("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})])
def test_qwen_is_not_permuted(
    write_gguf: Write, tiny_config: LanguageConfig, architecture: str, options: dict[str, Any]
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
        "must be one of llama, qwen, qwen2, qwen3, got 'gemma'",
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
        {"metadata": {"llama.rope.scaling.type": "longrope"}},
        "rope scaling must be none, linear or yarn, got longrope",
    ),
    "rope factors": ({"edit": put("rope_freqs.weight", NAN[:4])}, r"factors\[0\] must be greater than 0, got nan"),
    "few rope factors": (
        {"edit": put("rope_freqs.weight", np.ones(3, np.float32))},
        "factors must be 4 for heads of 8",
    ),
    "two rope scalings": (
        {"edit": put("rope_freqs.weight", NAN[:4]), "metadata": {"llama.rope.scaling.factor": 2.0}},
        "rope_freqs.weight must be the only rope scaling",
    ),
    "yarn of another kind": (
        {
            "metadata": {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.yarn_log_multiplier": 0.1,
            }
        },
        "yarn_log_multiplier must be 0.0",
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
    "tokenizer": ({"metadata": {"tokenizer.ggml.model": "bert"}}, "must be of kind 'gpt2' .*, got 'bert'"),
    "split": (
        {"metadata": {"tokenizer.ggml.pre": "tekken"}},
        "pre must be one of gpt-2, smollm",
    ),
    "merges": ({"metadata": {"tokenizer.ggml.merges": ["zz q"]}}, "tokens and merges do not fit together"),
    "too many tokens": (
        {
            "metadata": {
                "tokenizer.ggml.tokens": [f"t{number}" for number in range(300)],
                "tokenizer.ggml.token_type": [1] * 300,
            }
        },
        "every token must have a row of the embedding table, got ids up to 299 and 264 rows",
    ),
    "scores": ({"metadata": {"tokenizer.ggml.model": "llama"}}, "must give tokenizer.ggml.scores"),
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
