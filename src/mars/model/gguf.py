"""A GGUF file of llama.cpp, turned into fp32 safetensors, a tokenizer.json and our configuration."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from mars.errors import ConfigError, ModelError
from mars.model.config import LanguageConfig, RopeScaling
from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer
from mars.model.hub_config import yarn_attention
from mars.model.hub_folder import check_vocabulary
from mars.model.language_tensors import GGUF, GGUF_QWEN, Digest, Place, check_shapes, language_shapes

_LAYOUTS = {"llama": GGUF, "qwen": GGUF_QWEN, "qwen2": GGUF, "qwen3": GGUF}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion found out; the tensors and the tokenizer are in files."""

    config: LanguageConfig
    tokenizer_config: dict[str, Any]
    digest: str


class _Metadata:
    """The key/value part of a GGUF file, typed."""

    def __init__(self, reader: GGUFReader, *, source: str) -> None:
        self.reader = reader
        self.source = source

    def get(self, key: str) -> Any:
        field = self.reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise ModelError(f"{self.source}: {key} must be valid UTF-8; the file is damaged") from error

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.source} must give {key}, got none; the file is not a whole language model")
        return value


def _open(path: Path) -> GGUFReader:
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{path} must be a whole GGUF file, got: {error}; download it again") from error
    if reader.byte_order != "I":
        raise ModelError(f"{path} must have this machine's byte order, got the other one; use another file")
    return reader


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _number(value: Any) -> float:
    """A float32 of a file as the shortest number that means the same: 9.99999975e-06 was 1e-5."""
    return float(str(np.float32(value)))


def _architecture(metadata: _Metadata) -> str:
    architecture = metadata.need("general.architecture")
    if architecture not in _LAYOUTS:
        raise ModelError(
            f"{metadata.source}: architecture must be one of {', '.join(_LAYOUTS)}, got {architecture!r}; "
            "use another model"
        )
    return str(architecture)


def _config(metadata: _Metadata, found: dict[str, ReaderTensor]) -> LanguageConfig:
    source, architecture = metadata.source, _architecture(metadata)
    if "token_embd.weight" not in found:
        raise ModelError(f"{source} must hold tensor token_embd.weight, got none; the file is incomplete")
    try:
        width = int(metadata.need(f"{architecture}.embedding_length"))
        heads = int(metadata.need(f"{architecture}.attention.head_count"))
        layers = int(metadata.need(f"{architecture}.block_count"))
        if layers > len(found):
            raise ModelError(f"{source} must hold {layers} layers, got {len(found)} tensors; it is incomplete")
        head_width = int(metadata.get(f"{architecture}.attention.key_length") or width // heads)
        rotated = metadata.get(f"{architecture}.rope.dimension_count") or head_width
        if rotated != head_width:
            raise ModelError(
                f"{source}: a head's {head_width} channels must all rotate, got {rotated}; use another model"
            )
        ffn = int(metadata.need(f"{architecture}.feed_forward_length"))
        return LanguageConfig(
            vocab_size=_shape(found["token_embd.weight"])[0],
            width=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(metadata.get(f"{architecture}.attention.head_count_kv") or heads),
            head_width=head_width,
            # Qwen's first generation counts gate and up together, and its files say what its configuration says.
            ffn=ffn // 2 if architecture == "qwen" else ffn,
            rope_theta=float(metadata.get(f"{architecture}.rope.freq_base") or 10000.0),
            norm_eps=_number(metadata.need(f"{architecture}.attention.layer_norm_rms_epsilon")),
            max_positions=int(metadata.need(f"{architecture}.context_length")),
            tied_embeddings="output.weight" not in found,
            qkv_bias=architecture == "qwen" or "blk.0.attn_q.bias" in found,
            qk_norm="blk.0.attn_q_norm.weight" in found,
            rope_scaling=_rope_scaling(metadata, found, prefix=f"{architecture}.rope."),
        )
    except (TypeError, ValueError, ArithmeticError, ConfigError) as error:
        raise ModelError(f"{source}: {error}") from error


def _rope_scaling(metadata: _Metadata, found: dict[str, ReaderTensor], *, prefix: str) -> RopeScaling | None:
    """The scaling as llama.cpp reads it; a factor without a kind means `linear`."""
    kind = metadata.get(f"{prefix}scaling.type") or "linear"
    factor = _number(metadata.get(f"{prefix}scaling.factor") or metadata.get(f"{prefix}scale_linear") or 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{metadata.source}: rope scaling must be none, linear or yarn, got {kind}; use another model")
    if _ROPE_FACTORS in found:
        if kind != "none" and factor != 1.0:
            raise ModelError(f"{metadata.source}: {_ROPE_FACTORS} must be the only rope scaling, got {kind} too")
        values = dequantize(found[_ROPE_FACTORS].data, found[_ROPE_FACTORS].tensor_type)
        return RopeScaling(kind="factors", factors=tuple(float(value) for value in values.reshape(-1)))
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if (value := metadata.get(f"{prefix}scaling.{key}")) not in (None, usual):
            raise ModelError(f"{metadata.source}: {prefix}scaling.{key} must be {usual}, got {value}")
    sharpness = (metadata.get(f"{prefix}scaling.{key}") for key in ("attn_factor", "yarn_attn_factor"))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=int(
            metadata.get(f"{prefix}scaling.original_context_length")
            or metadata.need(f"{prefix.partition('.')[0]}.context_length")
        ),
        attention_factor=yarn_attention(factor) * math.prod(_number(value) for value in sharpness if value),
        beta_fast=_number(metadata.get(f"{prefix}scaling.yarn_beta_fast") or 32.0),
        beta_slow=_number(metadata.get(f"{prefix}scaling.yarn_beta_slow") or 1.0),
    )


def _rotate_half(rows: npt.NDArray[np.float32], *, heads: int) -> npt.NDArray[np.float32]:
    """Undoes llama.cpp's order of query and key rows.

    It puts the two rows that rotate together side by side (0, E/2, 1, E/2+1, ...); we keep the halves apart.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _tensor(found: ReaderTensor, place: Place, *, heads: int, source: str) -> torch.Tensor:
    """One of our tensors; `heads` is 0 where rows keep their order."""
    try:
        values = np.asarray(dequantize(found.data[place.start : place.stop], found.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(
            f"{source}: type {found.tensor_type.name} of tensor {found.name} cannot be read; use another file"
        ) from error
    if not np.isfinite(values).all():
        raise ModelError(f"{source}: tensor {found.name} must be finite, got NaN or infinity; the file is damaged")
    if heads:
        values = _rotate_half(values, heads=heads)
    return torch.from_numpy(np.array(values, order="C", copy=not values.flags.writeable))


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The header of a safetensors file of fp32 tensors that follow each other in the order of `shapes`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tokens(metadata: _Metadata, *, architecture: str) -> GGUFTokens:
    # Files of the first Qwen are older than this key; only one tokenizer goes with them.
    pre = metadata.get("tokenizer.ggml.pre") or ("qwen2" if architecture == "qwen" else "default")
    kind = str(metadata.need("tokenizer.ggml.model"))
    spaces = metadata.get("tokenizer.ggml.add_space_prefix")
    return GGUFTokens(
        model=kind,
        pre=str(pre),
        tokens=metadata.need("tokenizer.ggml.tokens"),
        kinds=metadata.need("tokenizer.ggml.token_type"),
        merges=metadata.need("tokenizer.ggml.merges") if kind == "gpt2" else [],
        scores=metadata.need("tokenizer.ggml.scores") if kind == "llama" else [],
        space_prefix=spaces is None or bool(spaces),
        normalized=bool(
            metadata.get("tokenizer.ggml.remove_extra_whitespaces")
            or metadata.get("tokenizer.ggml.precompiled_charsmap")
        ),
    )


def convert_gguf(path: Path, *, tensors: Path, tokenizer: Path) -> Converted:
    """Writes the fp32 safetensors file `tensors` (our names) and the tokenizer.json `tokenizer`.

    One tensor is in memory at a time. Raises ModelError when the file is damaged, incomplete, or not of a
    Llama or Qwen model.
    """
    reader, source = _open(path), str(path)
    metadata = _Metadata(reader, source=source)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config, architecture = _config(metadata, found), _architecture(metadata)
    shapes = language_shapes(config)
    places, expected = _LAYOUTS[architecture].places(shapes)
    stored = {name: _shape(tensor) for name, tensor in found.items() if name != _ROPE_FACTORS}
    check_shapes(stored, expected=expected, source=source)
    tokens = _tokens(metadata, architecture=architecture)
    check_vocabulary(len(tokens.tokens) - 1, rows=config.vocab_size, source=source)
    write_tokenizer(tokens, path=tokenizer, source=source)
    # llama.cpp puts rows that rotate together side by side in this family alone.
    turned = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if architecture == "llama" else {}
    shapes, digest = dict(sorted(shapes.items())), Digest()
    with tensors.open("wb") as file:
        file.write(_header(shapes))
        for name in shapes:
            place, part = places[name], name.rsplit(".", 2)[-2]
            tensor = _tensor(found[place.tensor], place, heads=turned.get(part, 0), source=source)
            digest.add(name, tensor)
            file.write(tensor.numpy().data)
    return Converted(
        config=config,
        tokenizer_config={
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "chat_template": metadata.get("tokenizer.chat_template"),
        },
        digest=digest.result(),
    )
