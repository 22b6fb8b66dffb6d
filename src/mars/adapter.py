"""LoRA adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as `peft` 0.21 writes and reads them.

The digest of the weights that an adapter was trained on stands in the metadata of the safetensors file.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mars.checkpoint import MarsModel, load_model, read_json, read_tensors, save_tensors, write_json
from mars.errors import CheckpointError, RequestError
from mars.model.language_tensors import Digest, tensors_digest
from mars.model.lora import Adapter, LoraConfig, merged
from mars.model.precision import Precision, is_rounded, replace_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What `peft` puts before the name of a module."""
_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight")
_PLAIN: dict[str, Any] = {
    "use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "lora_bias": False,
}  # fmt: skip
"""Settings of `peft` that change what an adapter means, and the values that are read."""


def visual_digest(visual: Mapping[str, Tensor]) -> str:
    """Digest of a model's visual tensors at 16 bits: the same for the weights of a run and for the model made of it."""
    digest = Digest()
    for name in sorted(visual):
        digest.add(name, visual[name].detach().half())
    return digest.result()


def save_adapter(folder: Path, adapter: Adapter, config: LoraConfig, *, base: str) -> None:
    """Writes both files into an existing folder, the matrices in fp32.

    Args:
        base: what the model is called that it was trained on.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    tensors = {PREFIX + name: half.float() for name, half in adapter.tensors().items()}
    metadata = {"format": "pt"} | ({} if adapter.base_digest is None else {"base_digest": adapter.base_digest})
    save_tensors(folder / WEIGHTS, tensors, metadata)
    targets = "|".join(sorted({name.rpartition(".")[2] for name in adapter.pairs}))
    table = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "target_modules": rf"layers\.\d+\.visual\.({targets})",  # a list would match the frozen LLM's layers too
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **_PLAIN,
    }
    write_json(folder / CONFIG, table)


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder; whether it fits a model is seen when it is merged.

    Raises:
        CheckpointError: if a file is missing or damaged, or says what plain LoRA cannot.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no LoRA adapter at {folder}: it must hold {CONFIG} and {WEIGHTS}, {name} is missing"
            )
    rank, scale = _read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or ".visual." not in found[1]:
            raise CheckpointError(f"{folder / WEIGHTS} must adapt the visual expert's linear layers only, got {key}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / WEIGHTS}: {key} holds NaN or infinity; train it again")
        halves.setdefault(found[1], {})[found[2]] = tensor
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise CheckpointError(
                f"{folder / WEIGHTS} must hold lora_A and lora_B of {name}, got {' '.join(half)} only"
            )
        a, b = half["A"], half["B"]
        if a.dim() != 2 or b.dim() != 2 or (len(a), b.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{folder / WEIGHTS} must have the rank r = {rank} of {CONFIG}, but {name} has matrices of "
                f"{'x'.join(map(str, a.shape))} and {'x'.join(map(str, b.shape))}"
            )
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS} must hold at least one adapted layer, got none")
    pairs = {name: (half["A"], half["B"]) for name, half in sorted(halves.items())}
    return Adapter(name=str(folder), pairs=pairs, scale=scale, base_digest=_base_digest(folder / WEIGHTS))


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and scale."""
    table = read_json(path)
    rank, alpha = table.get("r"), table.get("lora_alpha")
    if table.get("peft_type") != "LORA" or type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{path} must be of peft_type LORA with numbers r and lora_alpha, got {table.get('peft_type')!r}, "
            f"{rank!r} and {alpha!r}"
        )
    for name, plain in _PLAIN.items():
        if (found := table.get(name)) and found != plain:
            raise CheckpointError(f"{path}: {name} must be {plain!r}, got {found!r}; only plain LoRA is read")
    return rank, alpha / (rank**0.5 if table.get("use_rslora") else rank)


def _base_digest(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("base_digest")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def check_base(adapter: Adapter, *, digest: str, model: str) -> None:
    """Raises CheckpointError if an adapter says that it was trained on other weights than those of this digest."""
    if adapter.base_digest is not None and adapter.base_digest != digest:
        raise CheckpointError(
            f"{adapter.name} was trained on the visual expert {adapter.base_digest[:19]}…, but {model}'s is "
            f"{digest[:19]}…; use the model that it was trained on"
        )


def load_adapted(
    folder: Path,
    lora: Path,
    *,
    scale: float = 1.0,
    precision: Precision = "fp32",
    notify: Callable[[str], None] | None = None,
) -> MarsModel:
    """Opens a model's folder with an adapter merged into its weights, before any rounding: drawing costs no more.

    Args:
        scale: how strongly the adapter counts; 0 is not at all, 1 as it was trained.

    Raises:
        CheckpointError: if the adapter cannot be read or belongs to another model.
        RequestError: if the scale is not finite.
        ConfigError, ModelError: as `load_model`.
    """
    check_scale(scale)
    adapter = read_adapter(lora)

    def merge(visual: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        check_base(adapter, digest=visual_digest(visual), model=str(folder))
        return merged(visual, adapter, scale=scale)

    return _named(load_model(folder, precision=precision, notify=notify, merge=merge), adapter, scale=scale)


@torch.no_grad()
def adapt(model: MarsModel, lora: Path, *, scale: float = 1.0) -> MarsModel:
    """Merges an adapter into a model in memory, whose weights change.

    Raises:
        CheckpointError: if the adapter cannot be read or belongs to another model; nothing has changed then.
        RequestError: if the model's weights are rounded or have an adapter already, or the scale is not finite.
    """
    check_scale(scale)
    if is_rounded(model.precision) or model.lora is not None:
        state = f"rounded to {model.precision}" if model.lora is None else f"those of {model.lora} already"
        raise RequestError(f"an adapter is merged into plain fp32 weights, these are {state}; open the model with it")
    adapter = read_adapter(lora)
    visual = model.transformer.visual_tensors()
    check_base(adapter, digest=visual_digest(visual), model=model.info.name)
    replace_weights(model.transformer, merged(visual, adapter, scale=scale), model.precision)
    return _named(model, adapter, scale=scale)


def check_scale(scale: float) -> None:
    """Raises RequestError for a scale that cannot be used."""
    if not math.isfinite(scale):
        raise RequestError(f"lora_scale must be a finite number, 1 as trained, got {scale}")


def _named(model: MarsModel, adapter: Adapter, *, scale: float) -> MarsModel:
    """With a digest of its own, since its pictures are no longer the base model's."""
    parts = adapter.tensors() | {"base": torch.frombuffer(bytearray(model.visual_digest.encode()), dtype=torch.uint8)}
    parts |= {"scale": torch.tensor(scale * adapter.scale, dtype=torch.float64)}
    return replace(model, visual_digest=tensors_digest(parts), lora=f"{Path(adapter.name).name} x {scale:g}")
