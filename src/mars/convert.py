"""An untrained MARS out of a pre-trained LLM and an image tokenizer."""

from collections.abc import Callable
from pathlib import Path

import torch

from mars.checkpoint import (
    ModelInfo,
    is_image_tokenizer,
    load_image_tokenizer,
    save_model,
)
from mars.errors import CheckpointError, ModelError, RequestError
from mars.files import atomic_folder, place_for
from mars.hub import hub_folder, is_hub_id
from mars.image_tokenizer.convert import PARTS, convert_image_tokenizer, find_weights
from mars.image_tokenizer.model import ImageTokenizer
from mars.memory import check_memory
from mars.model.base_llm import BaseLLM, lasting_source, open_base_llm
from mars.model.config import ModelConfig, SemVIEConfig
from mars.model.hub_export import hub_fields, save_language
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.text import TextTokenizer

LANGUAGE_FOLDER = "language"
"""Where a self-contained model keeps its LLM."""


def init_model(
    out: Path,
    *,
    language: str,
    revision: str | None = None,
    image_tokenizer: str,
    semvie: SemVIEConfig | None = None,
    size: int = 256,
    name: str | None = None,
    seed: int = 0,
    include_language: bool = False,
    notify: Callable[[str], None] | None = None,
) -> ModelInfo:
    """Writes a model that can be trained, and draws noise until it is: copied visual expert, mean-started tables.

    The LLM stays memory-mapped; the visual expert is made in fp16.

    Args:
        language, revision: as `open_base_llm` takes them.
        image_tokenizer: a folder of ours, or one of another project (see `convert_image_tokenizer`), or a hub id.
        size: pixels on each side of the pictures that it will be trained on.
        out: must be new or empty.
        name: default is the folder's.
        include_language: write the LLM into the folder too, so that it needs nothing else.

    Raises:
        ModelError: if the LLM or the image tokenizer cannot be opened, or memory is too small.
        CheckpointError: if the image tokenizer is damaged, or the folder cannot be written.
        ConfigError: if the options do not fit the LLM or the size.
        RequestError: if the size is no multiple of the image tokenizer's factor, or has more codes than the LLM reads.
    """
    out = place_for(out, error=CheckpointError)
    codec = open_image_tokenizer(image_tokenizer)
    side = _side(size, factor=codec.config.factor)
    llm = open_base_llm(language, revision=revision, dtype=None, notify=notify)
    config = ModelConfig(language=llm.config, semvie=semvie or SemVIEConfig(), num_codes=codec.config.num_codes)
    _check(llm, config, side=side, include_language=include_language)
    transformer = build_transformer(config, llm.tensors, visual_dtype=torch.float16)
    codebook_VZ = codec.quantizer.embedding.weight
    start_visual(transformer, generator=torch.Generator().manual_seed(seed), codebook_VZ=codebook_VZ)
    info = ModelInfo(
        name=name or out.name,
        language=f"./{LANGUAGE_FOLDER}" if include_language else lasting_source(language),
        language_revision=None if include_language else revision,
        language_digest=llm.digest,
        grids=((side, side),),
        factor=codec.config.factor,
    )
    with atomic_folder(out) as folder:
        save_model(folder, info=info, transformer=transformer, image_tokenizer=codec)
        if include_language:
            (folder / LANGUAGE_FOLDER).mkdir()
            save_language(llm, folder / LANGUAGE_FOLDER)
    return info


def _side(size: int, *, factor: int) -> int:
    """Codes on each side of a picture."""
    if size < factor or size % factor:
        raise RequestError(f"the size must be a multiple of {factor}, the image tokenizer's factor, got {size}")
    return size // factor


def _check(llm: BaseLLM, config: ModelConfig, *, side: int, include_language: bool) -> None:
    """Says what would go wrong later, before anything that takes long."""
    TextTokenizer(llm.tokenizer, config=llm.tokenizer_config)
    if include_language:
        hub_fields(llm.config)
    across = side // config.semvie.cell
    if across**2 >= llm.config.max_positions:
        raise RequestError(
            f"the size must take fewer than the LLM's {llm.config.max_positions} positions, got {across}x{across}"
        )
    config.semvie.check_grid(side, side)
    with torch.device("meta"):
        weights = MarsTransformer(config).visual_tensors().values()
    check_memory(
        2 * sum(weight.numel() for weight in weights),
        what="the visual expert",
        advice="choose fewer visual_layers or a smaller visual_width, or close other programs",
    )


def open_image_tokenizer(source: str) -> ImageTokenizer:
    """An image tokenizer of ours or of another project, from a folder, a file or the hub.

    Raises:
        ModelError: if there is none.
        CheckpointError: if it is damaged or of no known family.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if not is_hub_id(source):
            raise ModelError(f"an image tokenizer must be a folder, a file or a hub id, got {source}: no such file")
        path = hub_folder(source, revision=None, is_whole=_holds_weights, subfolders=PARTS)
    if is_image_tokenizer(path):
        return load_image_tokenizer(path)[0]
    return convert_image_tokenizer(path)


def _holds_weights(folder: Path) -> bool:
    try:
        return find_weights(folder).is_file()
    except ModelError:
        return False
