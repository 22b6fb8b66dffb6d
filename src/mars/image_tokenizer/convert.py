"""Files of others to our image tokenizer: read without running anything, checked tensor by tensor, renamed."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mars.errors import CheckpointError, ConfigError, ModelError, RequestError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.families import FAMILIES, Family, describe, detect_family, known_families
from mars.image_tokenizer.model import ImageTokenizer
from mars.image_tokenizer.quantizer import sign_codebook

SAFE = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
USUAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Which file of a folder is meant if there are several (others are copies in half precision)."""
PARTS = ("vqvae", "vae")
"""Where the folder of a whole pipeline keeps its image tokenizer."""


def convert_image_tokenizer(source: Path, *, family: str | None = None) -> ImageTokenizer:
    """Opens an image tokenizer of another project as ours, in fp32.

    Args:
        source: a file of weights, or a folder that holds one and perhaps a `config.json`.
        family: a key of `FAMILIES`; None finds it out.

    Raises:
        ModelError: if there is no such file.
        CheckpointError: if it is damaged, of no known family, or its tensors do not fit.
        RequestError: if `family` is none that we know.
    """
    if family is not None and family not in FAMILIES:
        raise RequestError(f"family must be one of those known, got {family!r}; known are {known_families()}")
    file = find_weights(source)
    tensors, config = read_weights(file), _read_config(file.parent)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    chosen = FAMILIES[family or detect_family(shapes, config, source=str(file))]
    return from_tensors(tensors, family=chosen, config=config, source=str(file))


def from_tensors(
    tensors: Mapping[str, Tensor], *, family: Family, config: Mapping[str, Any] | None = None, source: str
) -> ImageTokenizer:
    """Our image tokenizer with the tensors of a family; `config` is its `config.json`, which few families have.

    Raises:
        CheckpointError: if a tensor is missing, unknown, of another shape, or not finite.
    """
    norm_groups = _norm_groups(config or {}, source=source)
    if family.averaged:
        tensors = _averages(tensors, source=source)
    tensors = {name: tensor for name, tensor in tensors.items() if not re.match(family.ignored, name)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        ours = describe(shapes, family, norm_groups=norm_groups, source=source)
    except ConfigError as error:
        raise CheckpointError(f"{source} cannot be an image tokenizer of ours: {error}") from None
    return _build(ours, tensors, family=family, source=source)


def _build(
    config: ImageTokenizerConfig, tensors: Mapping[str, Tensor], *, family: Family, source: str
) -> ImageTokenizer:
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    lookup_free = config.code_choice == "lfq"
    made = {"quantizer.bias", *(["quantizer.embedding.weight"] if lookup_free else [])}
    wanted = {name: tensor for name, tensor in tokenizer.state_dict().items() if name not in made}
    names = {name: family.name(name, len(config.channels)) for name in wanted}
    _check(tensors, {names[name]: tensor for name, tensor in wanted.items()}, source=source)
    # Attention is a 1x1 convolution here and a matrix elsewhere: the same numbers in another shape.
    state = {name: tensors[names[name]].float().reshape(tensor.shape) for name, tensor in wanted.items()}
    state["quantizer.bias"] = torch.zeros(config.num_codes)
    if lookup_free:
        state["quantizer.embedding.weight"] = sign_codebook(config.code_width)
        # Their highest bit is the first channel, ours the lowest: the channels change places, the codes stay.
        for name in ("quant_conv.weight", "quant_conv.bias"):
            state[name] = state[name].flip(0)
        state["post_quant_conv.weight"] = state["post_quant_conv.weight"].flip(1)
    if config.code_choice == "cosine":  # their rule reads unit rows; so that neighbours among codes are found by it too
        state["quantizer.embedding.weight"] = F.normalize(state["quantizer.embedding.weight"], dim=1)
    tokenizer.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return tokenizer.eval().requires_grad_(False)


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str) -> None:
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        shape, tensor = list(wanted[name].shape), found[name]
        matrix = shape[2:] == [1, 1] and list(tensor.shape) == shape[:2]
        if list(tensor.shape) != shape and not matrix:
            problems.append(f"{name} must be {shape}, got {list(tensor.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} must hold fp32, fp16 or bf16, got {tensor.dtype}")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        some = "; ".join(sorted(problems)[:3])
        raise CheckpointError(f"{source} does not fit its family: {some}{rest}; choose another family or file")


def _averages(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The running averages under the names of the weights; the weights themselves if there are no averages.

    Averages are stored as latent diffusion does: `model_ema.` and the weight's name without its dots.
    """
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("model_ema.")}
    last = {name: tensor for name, tensor in tensors.items() if name not in averages}
    if not averages:
        return last
    chosen = {}
    for name, tensor in last.items():
        average = averages.pop(f"model_ema.{name.replace('.', '')}", None)
        if average is None and not name.startswith("loss."):
            raise CheckpointError(
                f"{source} must hold the average of {name}, got other averages only; the file is incomplete"
            )
        chosen[name] = tensor if average is None else average
    counters = ("model_ema.decay", "model_ema.num_updates", "model_ema.loss")
    return chosen | {name: tensor for name, tensor in averages.items() if not name.startswith(counters)}


def _norm_groups(config: Mapping[str, Any], *, source: str) -> int:
    """The groups of the norms, which no tensor shows; refuses what a `config.json` says that tensors do not."""
    for name, wanted in (("norm_type", "group"), ("act_fn", "silu")):
        if config.get(name, wanted) != wanted:
            raise CheckpointError(f"{source}: {name} must be {wanted!r}, got {config[name]!r}; use another tokenizer")
    groups = config.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f"{source}: norm_num_groups must be a number from 1, got {groups!r}; mend config.json")
    return groups


def find_weights(source: Path) -> Path:
    """The one file of weights that is meant by a file or a folder.

    Raises:
        ModelError: if there is none, or more than one.
    """
    if source.is_file():
        if source.suffix not in (SAFE, *PICKLED):
            raise ModelError(f"weights must be a file of {', '.join((SAFE, *PICKLED))}, got {source}")
        return source
    if not source.is_dir():
        raise ModelError(f"no image tokenizer at {source}; name a file of weights, or the folder that holds it")
    for folder in (source, *(source / part for part in PARTS)):
        for name in USUAL:
            if (folder / name).is_file():
                return folder / name
        for suffixes in ((SAFE,), PICKLED):
            files = sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())
            if len(files) > 1:
                names = ", ".join(path.name for path in files)
                raise ModelError(f"{folder} must hold one file of weights, got {names}; name the file itself")
            if files:
                return files[0]
    raise ModelError(f"{source} must hold a file of weights ({', '.join((SAFE, *PICKLED))}), got none")


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, of safetensors or of `torch.save`.

    Nothing in a pickle is run: PyTorch's reader for weights makes tensors and plain containers only, and of every other
    class (Lightning stores its callbacks) we have it make an empty `Placeholder`.

    Raises:
        CheckpointError: if it is damaged, or holds something that cannot be read so.
    """
    if file.suffix == SAFE:
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from error
    try:
        content = _unpickle(file)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        why = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{file} must be readable as weights alone, got: {why}; load it where it was made and save its state_dict "
            "with safetensors.torch.save_file"
        ) from error
    for key in ("ema", "model", "state_dict"):  # the order in which LlamaGen looks; Lightning has the last
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(
            f"{file} must hold a mapping of tensors, by itself or as ema, model or state_dict, got something else"
        )
    return {str(name): tensor for name, tensor in content.items()}


class Placeholder:
    """Stands for an object of a pickle that is no tensor; remembers nothing."""

    def __init__(self, *arguments: object) -> None:
        """Drops what the object was made with."""

    def __setstate__(self, state: object) -> None:
        """Drops what the object held."""


def _unpickle(file: Path) -> Any:
    strange = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
    with torch.serialization.safe_globals([(Placeholder, name) for name in strange]):
        return torch.load(file, map_location="cpu", weights_only=True)
