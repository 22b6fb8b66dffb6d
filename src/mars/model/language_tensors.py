"""The tensors of the language expert: their names and shapes here, their names elsewhere, and their digest.

Letters: D width, H query heads, G key/value heads, E head width, F feed-forward width, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from mars.errors import ModelError
from mars.model.config import LanguageConfig

# ours -> (the hub's, GGUF's)
_TOP = {
    "language_embedding": ("model.embed_tokens", "token_embd"),
    "language_norm": ("model.norm", "output_norm"),
    "language_head": ("lm_head", "output"),
}
_LAYER = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "q_proj": ("self_attn.q_proj", "attn_q"),
    "k_proj": ("self_attn.k_proj", "attn_k"),
    "v_proj": ("self_attn.v_proj", "attn_v"),
    "o_proj": ("self_attn.o_proj", "attn_output"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "up_proj": ("mlp.up_proj", "ffn_up"),
    "down_proj": ("mlp.down_proj", "ffn_down"),
}


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
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module][0]}.{kind}"
    _, number, _, part = module.split(".")
    return f"model.layers.{number}.{_LAYER[part][0]}.{kind}"


def gguf_name(name: str) -> str:
    """GGUF's name: `layers.0.language.q_proj.bias` -> `blk.0.attn_q.bias`."""
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module][1]}.{kind}"
    _, number, _, part = module.split(".")
    return f"blk.{number}.{_LAYER[part][1]}.{kind}"


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
