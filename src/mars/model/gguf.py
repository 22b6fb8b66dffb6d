"""A GGUF file of llama.cpp, turned into fp32 safetensors, a tokenizer.json and our configuration."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from mars.errors import ConfigError, ModelError
from mars.model.config import LanguageConfig
from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer
from mars.model.language_tensors import Digest, check_shapes, gguf_name, language_shapes

_ARCHITECTURES = ("llama", "qwen2", "qwen3")


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


def _config(metadata: _Metadata, shapes: dict[str, tuple[int, ...]]) -> LanguageConfig:
    source = metadata.source
    architecture = metadata.need("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelError(f"{source}: architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{source} must hold tensor token_embd.weight, got none; the file is incomplete")
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or "rope_freqs.weight" in shapes:
        raise ModelError(
            f"{source}: rope scaling must be absent, got {scaling or 'rope_freqs.weight'}; use another model"
        )
    try:
        width = int(metadata.need(f"{architecture}.embedding_length"))
        heads = int(metadata.need(f"{architecture}.attention.head_count"))
        layers = int(metadata.need(f"{architecture}.block_count"))
        if layers > len(shapes):
            raise ModelError(f"{source} must hold {layers} layers, got {len(shapes)} tensors; it is incomplete")
        # 1e-5 is stored as the float32 9.99999975e-06: take the shortest number that means the same float32.
        epsilon = np.float32(metadata.need(f"{architecture}.attention.layer_norm_rms_epsilon"))
        head_width = int(metadata.get(f"{architecture}.attention.key_length") or width // heads)
        rotated = metadata.get(f"{architecture}.rope.dimension_count") or head_width
        if rotated != head_width:
            raise ModelError(
                f"{source}: a head's {head_width} channels must all rotate, got {rotated}; use another model"
            )
        return LanguageConfig(
            vocab_size=shapes["token_embd.weight"][0],
            width=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(metadata.get(f"{architecture}.attention.head_count_kv") or heads),
            head_width=head_width,
            ffn=int(metadata.need(f"{architecture}.feed_forward_length")),
            rope_theta=float(metadata.get(f"{architecture}.rope.freq_base") or 10000.0),
            norm_eps=float(str(epsilon)),
            max_positions=int(metadata.need(f"{architecture}.context_length")),
            tied_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            qk_norm="blk.0.attn_q_norm.weight" in shapes,
        )
    except (TypeError, ValueError, ZeroDivisionError, ConfigError) as error:
        raise ModelError(f"{source}: {error}") from error


def _rotate_half(rows: npt.NDArray[np.float32], *, heads: int) -> npt.NDArray[np.float32]:
    """Undoes llama.cpp's order of query and key rows.

    It puts the two rows that rotate together side by side (0, E/2, 1, E/2+1, ...); we keep the halves apart.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _tensor(found: ReaderTensor, *, name: str, config: LanguageConfig, interleaved: bool, source: str) -> torch.Tensor:
    try:
        values = np.asarray(dequantize(found.data, found.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(
            f"{source}: type {found.tensor_type.name} of tensor {found.name} cannot be read; use another file"
        ) from error
    if not np.isfinite(values).all():
        raise ModelError(f"{source}: tensor {found.name} must be finite, got NaN or infinity; the file is damaged")
    if interleaved and ".q_proj." in name:
        values = _rotate_half(values, heads=config.num_heads)
    if interleaved and ".k_proj." in name:
        values = _rotate_half(values, heads=config.num_kv_heads)
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


def _tokens(metadata: _Metadata) -> GGUFTokens:
    return GGUFTokens(
        model=str(metadata.need("tokenizer.ggml.model")),
        pre=str(metadata.get("tokenizer.ggml.pre") or "default"),
        tokens=metadata.need("tokenizer.ggml.tokens"),
        kinds=metadata.need("tokenizer.ggml.token_type"),
        merges=metadata.need("tokenizer.ggml.merges"),
    )


def convert_gguf(path: Path, *, tensors: Path, tokenizer: Path) -> Converted:
    """Writes the fp32 safetensors file `tensors` (our names) and the tokenizer.json `tokenizer`.

    One tensor is in memory at a time. Raises ModelError when the file is damaged, incomplete, or not of a
    Llama, Qwen2 or Qwen3 model.
    """
    reader, source = _open(path), str(path)
    metadata = _Metadata(reader, source=source)
    found = {tensor.name: tensor for tensor in reader.tensors}
    found_shapes = {name: _shape(tensor) for name, tensor in found.items()}
    config = _config(metadata, found_shapes)
    shapes = dict(sorted(language_shapes(config).items()))
    check_shapes(found_shapes, expected={gguf_name(name): shape for name, shape in shapes.items()}, source=source)
    write_tokenizer(_tokens(metadata), path=tokenizer, source=source)
    interleaved = metadata.need("general.architecture") == "llama"
    digest = Digest()
    with tensors.open("wb") as file:
        file.write(_header(shapes))
        for name in shapes:
            tensor = _tensor(found[gguf_name(name)], name=name, config=config, interleaved=interleaved, source=source)
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
