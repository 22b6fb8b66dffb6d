"""A tiny language model: as a folder in the hub's layout, as a GGUF file, and inside a transformer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig
from mars.model.language_tensors import GGUF, GGUF_QWEN, language_shapes
from mars.model.lora import lora_tensors
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.sequence.layout import drawn_image

ROWS = [[1, 40, 41, 42], [1]]
"""Prompts."""
CODES = torch.arange(12).view(2, 2, 3)
"""(B, R, C)."""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIALS, *ALPHABET, "he", "<tool>", "[PAD0]", "[PAD1]", "[PAD2]"]
KINDS = [3, 3, 3, *[1] * len(ALPHABET), 1, 4, 5, 5, 5]
CONFIG = LanguageConfig(
    vocab_size=len(TOKENS),
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn=64,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_positions=128,
    tied_embeddings=True,
)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of llama.cpp's convert_hf_to_gguf.py, as it stands there."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


BLOCKS = {gguf.GGMLQuantizationType.Q4_K: 144, gguf.GGMLQuantizationType.Q6_K: 210}
"""Bytes per block of 256 numbers, of types that `gguf` can read but not write."""


def quantize(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The rows in a type of GGUF, or random blocks of it where `gguf` cannot write it."""
    if kind not in BLOCKS:
        return gguf.quants.quantize(np.ascontiguousarray(rows), kind)
    generator = np.random.default_rng(rows.size)
    blocks = generator.integers(0, 256, (*rows.shape[:-1], rows.shape[-1] // 256, BLOCKS[kind]), dtype=np.uint8)
    half = np.float16(0.01).view(np.uint16)  # the scales of a block, which random bytes would make infinite
    places = (0, 2) if kind == gguf.GGMLQuantizationType.Q4_K else (208,)
    for place in places:
        blocks[..., place], blocks[..., place + 1] = half & 255, half >> 8
    return blocks.reshape(*rows.shape[:-1], -1)


def separate(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_tensors(config: LanguageConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = language_shapes(config)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tiny_config() -> LanguageConfig:
    return CONFIG


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """Writes a GGUF file; returns its path and the tensors that reading must give, under our names.

    `metadata` replaces values (None leaves a key out); `edit` changes the tensors, under GGUF's names.
    """

    def write(
        *,
        architecture: str = "llama",
        config: LanguageConfig = CONFIG,
        quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        metadata: dict[str, Any] | None = None,
        edit: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> tuple[Path, dict[str, np.ndarray]]:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (_metadata(architecture, config) | (metadata or {})).items():
            match value:
                case None:
                    pass
                case float():
                    writer.add_float32(key, value)
                case int():
                    writer.add_uint32(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_array(key, value)
        written: dict[str, np.ndarray] = {}
        expected: dict[str, np.ndarray] = {}
        layout = GGUF_QWEN if architecture == "qwen" else GGUF
        for name, values in random_tensors(config).items():
            heads = config.num_heads if ".q_proj" in name else config.num_kv_heads
            turned = architecture == "llama" and (".q_proj" in name or ".k_proj" in name)
            kind = quantization if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            stored = quantize(interleave(values, heads) if turned else values, kind)
            read = gguf.quants.dequantize(stored, kind).astype(np.float32)
            expected[name] = separate(read, heads) if turned else read
            theirs = layout.name(name)
            written[theirs] = np.concatenate([written[theirs], stored]) if theirs in written else stored
        if edit is not None:
            edit(written)
        for name, values in written.items():
            raw = quantization if values.dtype == np.uint8 else None
            writer.add_tensor(name, values, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, expected

    return write


def _metadata(architecture: str, config: LanguageConfig) -> dict[str, Any]:
    shapes = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "feed_forward_length": config.ffn * (2 if architecture == "qwen" else 1),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    return {f"{architecture}.{key}": value for key, value in shapes.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


@pytest.fixture
def write_hub_folder(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Has `transformers` save a tiny random model, all of whose weights show; returns the folder and the tensors."""

    def write(
        architecture: str = "Llama",
        *,
        shard_size: str = "5GB",
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        import transformers

        fields: dict[str, Any] = {
            "vocab_size": len(TOKENS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": [2, 0],
        }
        config = getattr(transformers, f"{architecture}Config")(**(fields | changes))
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        for name, weight in model.named_parameters():  # biases and norms start at 0 and 1, which would hide them
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.3)
        model = model.to(dtype)
        folder = tmp_path / "hub"
        model.save_pretrained(folder, max_shard_size=shard_size)
        write_tokenizer_json(folder / "tokenizer.json")
        return folder, dict(model.state_dict())

    return write


def write_tokenizer_json(path: Path) -> None:
    from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer

    tokens = GGUFTokens(model="gpt2", pre="smollm", tokens=TOKENS, kinds=KINDS, merges=["h e"])
    write_tokenizer(tokens, path=path, source="test")


def random_language(config: LanguageConfig) -> dict[str, torch.Tensor]:
    """Weights large enough that every part of a layer shows in its output, small enough to stay finite."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in language_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        norm = name.endswith("norm.weight")
        tensors[name] = 1 + 0.1 * values if norm else values * shape[-1] ** -0.5 if len(shape) > 1 else 0.3 * values
    return tensors


@pytest.fixture
def build() -> Callable[..., MarsTransformer]:
    """Builds a tiny transformer with random weights on both sides.

    `language` changes the LLM's shape, other arguments are those of SemVIEConfig. `start` gives the visual side the
    weights that training starts from.
    """

    def built(*, language: dict[str, Any] | None = None, start: bool = False, **semvie: Any) -> MarsTransformer:
        tiny = replace(CONFIG, vocab_size=21, num_layers=3, ffn=48, **(language or {}))
        config = ModelConfig(language=tiny, semvie=SemVIEConfig(**semvie), num_codes=13)
        transformer = build_transformer(config, random_language(tiny))
        generator = torch.Generator().manual_seed(1)
        start_visual(transformer, generator=generator)
        if not start:
            for name, weight in transformer.visual_tensors().items():
                values = torch.randn(weight.shape, generator=generator)
                small = 0.1 * values if weight.dim() == 1 else values * weight.shape[-1] ** -0.5
                weight.data.copy_(small + 1 if name.endswith("norm.weight") else small)
        return transformer

    return built


def train_adapter(transformer: MarsTransformer) -> None:
    """Moves every matrix of an adapter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lora_tensors(transformer).values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)


@torch.no_grad()
def codes_logits(transformer: MarsTransformer) -> Tensor:
    """Logits of the codes `CODES` after the prompts `ROWS`."""
    cache = transformer.new_cache()
    cache.load(read_prefixes(transformer, ROWS))
    return transformer.visual_logits(transformer(drawn_image(CODES, transformer.vocabulary), cache))
