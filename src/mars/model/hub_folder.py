"""An LLM in the hub's layout: a folder with config.json, safetensors and a tokenizer.

A tensor that is stored in the wanted dtype stays in its file, memory-mapped. Others are read and converted one by one,
so that no more is in memory than what is kept and one tensor.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mars.errors import ModelError
from mars.model.config import LanguageConfig
from mars.model.language_tensors import HUB, Layout, Place, check_shapes, language_shapes

TOKENIZER, TIKTOKEN = "tokenizer.json", "qwen.tiktoken"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.logn_tensor")
"""What some files hold beside the weights; it follows from the configuration."""
_CHUNK = 1 << 18
"""Numbers that are looked at together, so that looking takes little memory."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError when it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} must hold {path.name}, got none; a language model needs it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be a JSON file, got: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as the header of a safetensors file describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """`F32`, `BF16`, ..."""
    offset: int
    """Its first byte in the file."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Its rows `start` to `stop`, read into memory; a mapped page would stay there beside what is made of it."""
        dtype, row = _DTYPES[self.dtype], math.prod(self.shape[1:])
        raw = bytearray((stop - start) * row * dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * row * dtype.itemsize)
            if file.readinto(raw) != len(raw):
                raise ModelError(f"{self.path} must be a whole safetensors file, got a shorter one; download it again")
        return torch.frombuffer(raw, dtype=dtype).reshape(stop - start, *self.shape[1:])


def _index(folder: Path) -> dict[str, str]:
    """File of each tensor, by the index of a sharded model."""
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX} must hold a weight_map, got none")
    return {str(tensor): Path(str(file)).name for tensor, file in weight_map.items()}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise ModelError(f"{folder} must hold {_WEIGHTS} or {_INDEX}, got neither; only safetensors weights are read")
    return [folder / name for name in sorted(set(_index(folder).values()))]


def tokenizer_file(folder: Path) -> Path:
    """The folder's tokenizer.json, or qwen.tiktoken where it carries that instead; either may be missing."""
    if not (folder / TOKENIZER).is_file() and (folder / TIKTOKEN).is_file():
        return folder / TIKTOKEN
    return folder / TOKENIZER


def is_whole(folder: Path) -> bool:
    """Whether every file that we read is there."""
    try:
        files = _weight_files(folder)
    except ModelError:
        return False
    return all(path.is_file() for path in (folder / "config.json", tokenizer_file(folder), *files))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ModelError(f"{path.parent} must hold {path.name}, got none; the model is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} must be a whole safetensors file, got: {error}; download it again") from error


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by its name; ModelError when the file is missing or damaged."""
    with _opened(path), path.open("rb") as file:  # opening checks the header
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path=path, shape=tuple(one["shape"]), dtype=one["dtype"], offset=8 + size + one["data_offsets"][0]
        )
        for name, one in header.items()
    }


def _headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's files; ModelError when files and index disagree."""
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        stored |= stored_tensors(path)
    if (folder / _WEIGHTS).is_file():
        return stored
    index = _index(folder)
    for name, file in index.items():
        if name not in stored or stored[name].path.name != file:
            raise ModelError(f"{folder / _INDEX} names tensor {name} in {file}, which does not hold it; download both")
    for name in sorted(stored.keys() - index.keys()):
        raise ModelError(f"{stored[name].path} holds tensor {name}, which {_INDEX} does not name; download both again")
    return stored


def read_hub_tensors(
    folder: Path,
    config: LanguageConfig,
    *,
    layout: Layout = HUB,
    dtype: torch.dtype | None = torch.float32,
    check: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors under our names in `dtype` (None: as stored); memory-mapped where the files hold them so.

    `layout` is how the files name them. `check` hears of the bytes that converting will take before any is read.
    Raises ModelError when they are not those that `config` describes, not floating-point numbers, or not finite.
    """
    stored = {
        name: tensor
        for name, tensor in _headers(folder).items()
        if not name.endswith(_COMPUTED) and not (config.tied_embeddings and name == "lm_head.weight")
    }
    places, expected = layout.places(language_shapes(config))
    check_shapes({name: one.shape for name, one in stored.items()}, expected=expected, source=str(folder))
    for name, one in stored.items():
        if one.dtype not in _DTYPES:
            raise ModelError(f"{folder}: tensor {name} must hold fp32, fp16 or bf16, got {one.dtype}; use another file")
    if check is not None:
        copied = [one for one in stored.values() if dtype not in (None, _DTYPES[one.dtype])]
        check(sum(math.prod(one.shape) for one in copied) * (dtype or torch.float32).itemsize)
    tensors = {}
    for path in sorted({one.path for one in stored.values()}):
        here = {ours: place for ours, place in places.items() if stored[place.tensor].path == path}
        with _opened(path) as file:
            for ours, place in here.items():
                if dtype is None or _DTYPES[stored[place.tensor].dtype] == dtype:
                    tensors[ours] = file.get_tensor(place.tensor)[place.start : place.stop]
        for ours, place in here.items():
            if ours not in tensors:
                tensors[ours] = stored[place.tensor].read(place.start, place.stop).to(dtype)
            _check_finite(tensors[ours], place=place, path=path, stored=stored[place.tensor].dtype)
    return {ours: tensors[ours] for ours in places}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(piece.float().sum())) for piece in tensor.reshape(-1).split(_CHUNK))


def _check_finite(tensor: torch.Tensor, *, place: Place, path: Path, stored: str) -> None:
    if not is_finite(tensor):
        narrow = tensor.dtype == torch.float16 and stored != "F16"
        raise ModelError(
            f"{path.parent}: tensor {place.tensor} must be finite, got NaN or infinity; the file is damaged"
            + (f", or its {stored} numbers are too large for fp16" if narrow else "")
        )


def token_ids(path: Path) -> dict[str, int]:
    """Every token of a tokenizer.json and its id."""
    tokenizer = read_json(path)
    try:
        ids = {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or []}
        return {**(tokenizer.get("model") or {}).get("vocab", {}), **ids}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} must list its tokens, got: {error!r}; use another model") from error


def check_vocabulary(highest: int, *, rows: int, source: str) -> None:
    """Raises ModelError unless an embedding table of `rows` rows has one for every token id up to `highest`."""
    if highest >= rows:
        raise ModelError(
            f"{source}: every token must have a row of the embedding table, got ids up to {highest} and {rows} rows; "
            "use the tokenizer that belongs to the model"
        )


def read_tokenizer_config(folder: Path, *, tokenizer: Path, rows: int) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (int or None) and `chat_template` (str or None) of a hub folder.

    `tokenizer` is its tokenizer.json, and `rows` are those of the embedding table, which must be enough for it.
    """
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model = read_json(folder / "config.json")
    ids = token_ids(tokenizer)
    is_tiktoken = tokenizer_file(folder).name == TIKTOKEN
    check_vocabulary(max(ids.values(), default=0), rows=rows, source=str(tokenizer))

    def token_id(kind: str) -> int | None:
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            return int(ids[text])
        fallback = model.get(f"{kind}_token_id")
        first = fallback[0] if isinstance(fallback, list) and fallback else fallback
        # qwen.tiktoken comes with code instead of settings; its code ends and begins texts with the same token.
        return first if isinstance(first, int) else ids.get("<|endoftext|>") if is_tiktoken else None

    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {"bos_token_id": token_id("bos"), "eos_token_id": token_id("eos"), "chat_template": template}
