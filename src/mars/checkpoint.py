"""A folder of weights: `config.json` beside `.safetensors` files, saved whole or not at all, loaded strictly."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mars.config import from_dict, to_dict
from mars.errors import CheckpointError, ConfigError, ModelError, RequestError
from mars.files import cache_folder, remembered, whole_file
from mars.hub import hub_folder, is_hub_id
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.base_llm import open_base_llm
from mars.model.config import ModelConfig, UpscaleConfig
from mars.model.hub_folder import is_whole as is_whole_language
from mars.model.language_tensors import tensors_digest
from mars.model.precision import (
    Precision,
    check_model_memory,
    check_precision,
    is_rounded,
    lower_precision,
    replace_weights,
)
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.text import TextTokenizer


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, error=CheckpointError) as partial:
        try:
            save_file(kept, partial, metadata=dict(metadata) if metadata else None)  # {} and no tensors: unreadable
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files their owner's alone


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes readable JSON whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with whole_file(path, error=CheckpointError) as partial:
        partial.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if the file is missing or holds no JSON object.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}; a model folder holds one") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(table).__name__}")
    return table


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, where: str) -> None:
    """Compares names and shapes, and looks for values that are not finite.

    Raises:
        CheckpointError: naming the first differences and their number.
    """
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name].shape != found[name].shape:
            problems.append(f"{name} must be {list(wanted[name].shape)}, got {list(found[name].shape)}")
        elif found[name].is_floating_point() and not bool(torch.isfinite(found[name]).all()):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{where} does not fit its configuration: {'; '.join(sorted(problems)[:3])}{rest}")


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copies tensors into a module's own dtype after `check_tensors`."""
    copy_tensors(tensors, into=module.state_dict(), where=where)


@torch.no_grad()
def copy_tensors(found: Mapping[str, Tensor], *, into: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors over those of the same names, in their own dtype, after `check_tensors`."""
    check_tensors(found, into, where=where)
    for name, tensor in into.items():
        tensor.copy_(found[name])


FORMAT = "mars-1"
"""Version of the folder's layout."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model's folder says of it, beside the shapes."""

    name: str
    language: str
    """Where the LLM comes from, as `open_base_llm` takes it; `./...` lies in the model's own folder."""
    language_digest: str
    language_revision: str | None = None
    """Branch, tag or commit of an LLM on the hub."""
    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of the code grids that it was trained on."""
    factor: int | None = None
    """Pixels on each side of a code, by which a grid becomes a size; folders written before it was kept have none."""
    upscale: UpscaleConfig | None = None
    """How it was trained to draw its grids again, larger; null is not."""
    format: str = FORMAT

    def __post_init__(self) -> None:
        if self.language.startswith("./") and ".." in Path(self.language).parts:
            raise ConfigError(f"language must not leave the model's own folder by .., got {self.language}")
        if not self.grids or not all(rows > 0 and columns > 0 for rows, columns in self.grids):
            raise ConfigError(f"grids must hold at least one [rows, columns] above 0, got {list(self.grids)}")
        if self.factor is not None and self.factor < 1:
            raise ConfigError(f"factor must be at least 1, got {self.factor}")


@dataclass(frozen=True, kw_only=True)
class MarsModel:
    """A model in memory: everything that turns a prompt into a picture."""

    info: ModelInfo
    transformer: MarsTransformer
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer
    visual_digest: str
    """Digest of the visual expert and of the image tokenizer together, as stored."""
    precision: Precision = "fp32"
    """Of the weights in memory."""
    folder: Path | None = None
    """Where it was opened."""
    lora: str | None = None
    """The adapter that was merged into the visual expert, and how strongly."""


def save_image_tokenizer(folder: Path, tokenizer: ImageTokenizer, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes `image_tokenizer.json` and `image_tokenizer.safetensors`."""
    tensors = {name: tensor.to(dtype) for name, tensor in tokenizer.state_dict().items()}
    save_tensors(folder / "image_tokenizer.safetensors", tensors)
    write_json(folder / "image_tokenizer.json", to_dict(tokenizer.config))


def is_image_tokenizer(folder: Path) -> bool:
    """Whether a folder holds an image tokenizer of ours."""
    return (folder / "image_tokenizer.json").is_file()


def load_image_tokenizer(folder: Path) -> tuple[ImageTokenizer, dict[str, Tensor]]:
    """The image tokenizer of a folder, in fp32, and its tensors as stored.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit.
    """
    table = read_json(folder / "image_tokenizer.json")
    tensors = read_tensors(folder / "image_tokenizer.safetensors")
    try:
        tokenizer = ImageTokenizer(from_dict(ImageTokenizerConfig, table, where="image_tokenizer."))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'image_tokenizer.json'} is wrong: {error}") from None
    load_into(tokenizer, tensors, where=str(folder / "image_tokenizer.safetensors"))
    return tokenizer.eval().requires_grad_(False), tensors


def check_image_tokenizer(
    config: ImageTokenizerConfig, *, num_codes: int, factor: int | None = None, where: str
) -> None:
    """Compares an image tokenizer with what a model was trained with.

    Args:
        num_codes: of the transformer, whose tables have a row per code.
        factor: pixels on each side of a code; None if it is not known.
        where: the model, for the message.

    Raises:
        CheckpointError: if the number of codes or the factor is another.
    """
    kept = "use the image tokenizer that it was trained with"
    if config.num_codes != num_codes:
        raise CheckpointError(f"{where} needs an image tokenizer of {num_codes} codes, got {config.num_codes}; {kept}")
    if factor is not None and config.factor != factor:
        raise CheckpointError(
            f"{where} needs an image tokenizer of {factor}x{factor} pixels per code, "
            f"got {config.factor}x{config.factor}; {kept}"
        )


def codes_digest(tokenizer: ImageTokenizer) -> str:
    """Digest of what decides codes: encoder and codebook. Training the decoder alone does not change it."""
    parts = ("encoder.", "quant_conv.", "quantizer.")
    halves = {name: tensor.half() for name, tensor in tokenizer.state_dict().items() if name.startswith(parts)}
    return tensors_digest(halves)


def save_model(
    folder: Path,
    *,
    info: ModelInfo,
    transformer: MarsTransformer,
    image_tokenizer: ImageTokenizer,
    visual: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the visual side of a model into an existing folder; the LLM is only named.

    Args:
        visual: tensors to store in place of the transformer's own, such as their average.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    chosen = transformer.visual_tensors() if visual is None else visual
    tensors = {name: tensor.detach().to(dtype) for name, tensor in chosen.items()}
    save_tensors(folder / "visual.safetensors", tensors)
    save_image_tokenizer(folder, image_tokenizer, dtype=dtype)
    write_json(folder / "config.json", {**to_dict(info), "model": to_dict(transformer.config)})


def read_info(folder: Path) -> tuple[ModelInfo, ModelConfig]:
    """What `config.json` says.

    Raises:
        CheckpointError: if it is missing or wrong.
    """
    table = read_json(folder / "config.json")
    shapes = table.pop("model", None)
    if table.get("format") != FORMAT or not isinstance(shapes, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} must be of format {FORMAT!r} and name a model, got {table.get('format')!r}"
        )
    try:
        return from_dict(ModelInfo, table), from_dict(ModelConfig, shapes, where="model.")
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'} is wrong: {error}") from None


def is_whole_model(folder: Path) -> bool:
    """Whether every file of a model is there, its LLM's too if that lies in the same folder."""
    names = ("config.json", "visual.safetensors", "image_tokenizer.json", "image_tokenizer.safetensors")
    if not all((folder / name).is_file() for name in names):
        return False
    try:
        info, _ = read_info(folder)
    except CheckpointError:
        return False
    return not info.language.startswith("./") or is_whole_language(folder / info.language)


def find_model(source: str | Path, *, revision: str | None = None) -> Path:
    """A model's folder on this machine, fetched from the hub if it is only there.

    Raises:
        RequestError: for a revision of a folder.
        ModelError: if the hub has no such model, or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not is_hub_id(str(source)):
        if revision is not None:
            raise RequestError(f"a revision is for a model on the hub, got {revision} for the folder {folder}")
        return folder
    return hub_folder(str(source), revision=revision, is_whole=is_whole_model, subfolders=("language",))


def stored_digest(folder: Path) -> str:
    """Digest of the visual expert and of the image tokenizer together, as a model's folder stores them.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    visual, codec = (read_tensors(folder / f"{part}.safetensors") for part in ("visual", "image_tokenizer"))
    return tensors_digest({**visual, **{f"image_tokenizer.{name}": tensor for name, tensor in codec.items()}})


def load_model(
    folder: Path,
    *,
    precision: Precision = "fp32",
    notify: Callable[[str], None] | None = None,
    merge: Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]] | None = None,
) -> MarsModel:
    """Opens a model's folder and the LLM that it names.

    Weights of less than fp32 are rounded one after the other as they are read: they never stand whole in memory.
    `merge` is given the visual tensors before that, and gives those that take the place of others.

    Raises:
        ConfigError: for an unknown precision.
        CheckpointError: if the folder is damaged, or the LLM is not the one that the model was trained on.
        ModelError: if the LLM cannot be found, or memory is too small.
    """
    if not folder.is_dir():
        raise ModelError(f"no model at {folder}; name a folder that holds config.json and visual.safetensors")
    check_precision(precision)
    info, config = read_info(folder)
    image_tokenizer, _ = load_image_tokenizer(folder)  # before the LLM, which may take long
    check_image_tokenizer(image_tokenizer.config, num_codes=config.num_codes, factor=info.factor, where=str(folder))
    stored = read_tensors(folder / "visual.safetensors")
    with torch.device("meta"):
        shapes = MarsTransformer(config)
    check_tensors(stored, shapes.visual_tensors(), where=str(folder / "visual.safetensors"))
    llm = open_base_llm(
        language_source(info, folder=folder),
        revision=info.language_revision,
        dtype=None if is_rounded(precision) else torch.float32,
        notify=notify,
        check=partial(check_model_memory, shapes, name=info.name, precision=precision),
    )
    if llm.digest != info.language_digest:
        raise CheckpointError(
            f"{info.name} was trained on the LLM {info.language_digest[:19]}…, "
            f"but {info.language} is {llm.digest[:19]}…; name the first in config.json"
        )
    if llm.config != config.language:
        raise CheckpointError(f"{folder / 'config.json'} does not describe {info.language}; its language part is wrong")
    visual = stored if is_rounded(precision) else {name: tensor.float() for name, tensor in stored.items()}
    transformer = build_transformer(config, llm.tensors, visual=visual)
    if merge is not None:
        replace_weights(transformer, merge(visual), precision)
    lower_precision(transformer, precision)
    return MarsModel(
        info=info,
        transformer=transformer.eval(),
        image_tokenizer=image_tokenizer,
        text_tokenizer=TextTokenizer(llm.tokenizer, config=llm.tokenizer_config),
        visual_digest=remembered(
            [folder / "visual.safetensors", folder / "image_tokenizer.safetensors"],
            lambda: stored_digest(folder),
            cache=cache_folder(),
            what="digest of the visual side",
        ),
        precision=precision,
        folder=folder,
    )


def language_source(info: ModelInfo, *, folder: Path) -> str:
    """What `open_base_llm` is to open for the model of a folder."""
    return str(folder / info.language) if info.language.startswith("./") else info.language
