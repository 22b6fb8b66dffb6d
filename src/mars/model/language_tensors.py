"""The tensors of the language expert: their names and shapes here, their names elsewhere, and their digest.

Letters: D width, H query heads, G key/value heads, E head width, F feed-forward width, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mars.errors import ModelError
from mars.model.config import LanguageConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a file keeps one of our tensors: rows `start` to `stop` of the tensor that it calls `tensor`."""

    tensor: str
    start: int
    stop: int


class Layout:
    """How a kind of file names tensors. Several of ours under one name lie below each other there, in our order."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def name(self, ours: str) -> str:
        """Their name: `layers.0.language.q_proj.bias` -> `model.layers.0.self_attn.q_proj.bias` on the hub."""
        module, kind = ours.rsplit(".", 1)
        *layer, part = module.split(".")
        return f"{self._names[part].format(*layer[1:2])}.{kind}"

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Place], dict[str, tuple[int, ...]]]:
        """Where each of our tensors is, and the shape of each of theirs. `shapes` comes from `language_shapes`."""
        places: dict[str, Place] = {}
        stored: dict[str, tuple[int, ...]] = {}
        for ours, (rows, *rest) in shapes.items():
            theirs = self.name(ours)
            start = stored[theirs][0] if theirs in stored else 0
            places[ours] = Place(tensor=theirs, start=start, stop=start + rows)
            stored[theirs] = (start + rows, *rest)
        return places, stored


HUB = Layout(
    {
        "language_embedding": "model.embed_tokens",
        "language_norm": "model.norm",
        "language_head": "lm_head",
        "attention_norm": "model.layers.{}.input_layernorm",
        "q_proj": "model.layers.{}.self_attn.q_proj",
        "k_proj": "model.layers.{}.self_attn.k_proj",
        "v_proj": "model.layers.{}.self_attn.v_proj",
        "o_proj": "model.layers.{}.self_attn.o_proj",
        "q_norm": "model.layers.{}.self_attn.q_norm",
        "k_norm": "model.layers.{}.self_attn.k_norm",
        "ffn_norm": "model.layers.{}.post_attention_layernorm",
        "gate_proj": "model.layers.{}.mlp.gate_proj",
        "up_proj": "model.layers.{}.mlp.up_proj",
        "down_proj": "model.layers.{}.mlp.down_proj",
    }
)
"""Llama, Qwen2 and Qwen3 as `transformers` saves them."""
HUB_QWEN = Layout(
    {
        "language_embedding": "transformer.wte",
        "language_norm": "transformer.ln_f",
        "language_head": "lm_head",
        "attention_norm": "transformer.h.{}.ln_1",
        "q_proj": "transformer.h.{}.attn.c_attn",
        "k_proj": "transformer.h.{}.attn.c_attn",
        "v_proj": "transformer.h.{}.attn.c_attn",
        "o_proj": "transformer.h.{}.attn.c_proj",
        "ffn_norm": "transformer.h.{}.ln_2",
        # Not w1, as the names suggest: modeling_qwen.py applies silu to w2.
        "gate_proj": "transformer.h.{}.mlp.w2",
        "up_proj": "transformer.h.{}.mlp.w1",
        "down_proj": "transformer.h.{}.mlp.c_proj",
    }
)
"""The first generation of Qwen (Qwen-7B), by its published modeling_qwen.py."""
_GGUF = {
    "language_embedding": "token_embd",
    "language_norm": "output_norm",
    "language_head": "output",
    "attention_norm": "blk.{}.attn_norm",
    "q_proj": "blk.{}.attn_q",
    "k_proj": "blk.{}.attn_k",
    "v_proj": "blk.{}.attn_v",
    "o_proj": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "ffn_norm": "blk.{}.ffn_norm",
    "gate_proj": "blk.{}.ffn_gate",
    "up_proj": "blk.{}.ffn_up",
    "down_proj": "blk.{}.ffn_down",
}
GGUF = Layout(_GGUF)
"""llama.cpp's files of Llama, Qwen2 and Qwen3."""
GGUF_QWEN = Layout(_GGUF | dict.fromkeys(("q_proj", "k_proj", "v_proj"), "blk.{}.attn_qkv"))
"""llama.cpp's files of the first generation of Qwen."""


def language_shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a language expert; matrices are (out, in)."""
    d, f, v = config.width, config.ffn, config.vocab_size
    queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (d,),
        "q_proj.weight": (queries, d),
        "k_proj.weight": (keys, d),
        "v_proj.weight": (keys, d),
        "o_proj.weight": (d, queries),
        "ffn_norm.weight": (d,),
        "gate_proj.weight": (f, d),
        "up_proj.weight": (f, d),
        "down_proj.weight": (d, f),
    }
    if config.qkv_bias:
        layer |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if config.qk_norm:
        layer |= {"q_norm.weight": (config.head_width,), "k_norm.weight": (config.head_width,)}
    shapes: dict[str, tuple[int, ...]] = {"language_embedding.weight": (v, d), "language_norm.weight": (d,)}
    if not config.tied_embeddings:
        shapes["language_head.weight"] = (v, d)
    for number in range(config.num_layers):
        shapes |= {f"layers.{number}.language.{name}": shape for name, shape in layer.items()}
    return shapes


def hub_name(name: str) -> str:
    """The hub's name: `layers.0.language.q_proj.bias` -> `model.layers.0.self_attn.q_proj.bias`."""
    return HUB.name(name)


def check_shapes(found: Mapping[str, Sequence[int]], *, expected: Mapping[str, Sequence[int]], source: str) -> None:
    """Raises ModelError unless `found` holds exactly the expected names, each with its shape."""

    def some(names: Iterable[str]) -> str:
        ordered = sorted(names)
        return ordered[0] + (f" (and {len(ordered) - 1} more)" if len(ordered) > 1 else "")

    if missing := expected.keys() - found.keys():
        raise ModelError(
            f"{source} must hold tensor {some(missing)}, got none; the file is incomplete or of another model"
        )
    if extra := found.keys() - expected.keys():
        raise ModelError(
            f"{source} holds tensor {some(extra)}, which this architecture does not have; use another model"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ModelError(
                f"{source}: tensor {name} must have shape {tuple(shape)} by the file's own configuration, "
                f"got {tuple(found[name])}; the file is damaged"
            )


class Digest:
    """sha256 over tensors; add them in the sorted order of their names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor: its name, dtype, shape and bytes."""
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._hash.update(raw.numpy().data)

    def result(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return f"sha256:{self._hash.hexdigest()}"


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of named tensors, whatever their order and device: `sha256:` and 64 hexadecimal digits.

    It is the same for a `BaseLLM`'s tensors and for a transformer's, as long as the dtype is.
    """
    digest = Digest()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.result()
