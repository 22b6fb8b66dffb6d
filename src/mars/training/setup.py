"""Opens what a stage works with: the LLM, the image tokenizer, the visual expert that it starts from, the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mars.checkpoint import (
    ModelInfo,
    check_image_tokenizer,
    codes_digest,
    copy_tensors,
    language_source,
    load_image_tokenizer,
    read_info,
    read_tensors,
)
from mars.data.code_table import shard_files
from mars.data.documents import CodedImage, Document, read_all_documents
from mars.data.loader import Loader
from mars.errors import CheckpointError, ConfigError, DataError
from mars.files import files_digest
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.base_llm import BaseLLM, lasting_source, open_base_llm
from mars.model.config import ModelConfig, SemVIEConfig
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.layout import drawing_order
from mars.sequence.text import TextTokenizer
from mars.training.stages import DOCUMENT_TASKS, LANGUAGE, ModelSource, StageConfig

LOW_PROJECTION = "low_projection.weight"
"""What a model that is continued by the task `upscale` may lack."""


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """What the tasks of a stage draw from code shards."""

    drawn: Loader
    """Pictures, and the captions that they are drawn after."""
    described: Loader
    """Pictures, and the captions that are written of them: `drawn` itself, unless these are of other kinds."""
    pairs: Loader | None
    """Pictures in two sizes, for the task `upscale`: `drawn` itself, unless they are other shards."""
    held_out: Loader | None
    """Of the splits that are only measured."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a stage works with, on the CPU."""

    info: ModelInfo
    transformer: MarsTransformer
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    loaders: Loaders | None
    """None where all tasks learn documents."""
    documents: tuple[Document, ...]
    contents: dict[str, str]
    """What lies at the places that a configuration names, by its names there: a run that is continued shares it."""


def open_stage(config: StageConfig, *, notify: Callable[[str], None] | None = None) -> Opened:
    """Opens everything that a stage's configuration names, and gives the visual expert its starting weights.

    Raises:
        ConfigError, CheckpointError, DataError, ModelError: if something is missing or does not fit the rest.
    """
    source = config.model
    info, shapes = (None, None) if source.start_from is None else read_info(source.start_from)
    llm, language, revision = _open_language(source, info, notify=notify)
    codec = source.image_tokenizer or source.start_from
    assert codec is not None
    image_tokenizer, _ = load_image_tokenizer(codec)
    codes = codes_digest(image_tokenizer)
    loaders = _open_shards(config, wanted=codes, codec=codec) if config.data.shards else None
    documents = _open_documents(config, wanted=codes, codec=codec)
    num_codes = image_tokenizer.config.num_codes
    shapes = shapes or ModelConfig(language=llm.config, semvie=source.semvie or SemVIEConfig(), num_codes=num_codes)
    if source.start_from is not None:
        check_model(source.start_from, shapes=shapes, llm=(language, llm.digest), codec=image_tokenizer.config)
    drawn, pairs = (None, None) if loaders is None else (loaders.drawn, loaders.pairs)
    grids = _drawn_grids(documents) if drawn is None else drawn.grids
    shapes, grids = _fitted(config, shapes, grids=grids, pairs=pairs)
    transformer = build_transformer(shapes, llm.tensors)
    start_visual(
        transformer,
        generator=torch.Generator().manual_seed(config.seed),
        codebook_VZ=image_tokenizer.quantizer.embedding.weight,
    )
    opened = Opened(
        info=ModelInfo(
            name=config.name,
            language=lasting_source(language),
            language_revision=revision,
            language_digest=llm.digest,
            grids=grids,
            factor=image_tokenizer.config.factor,
            upscale=config.upscale if pairs else (info.upscale if info else None),
        ),
        transformer=transformer,
        text_tokenizer=TextTokenizer(llm.tokenizer, config=llm.tokenizer_config),
        image_tokenizer=image_tokenizer,
        loaders=loaders,
        documents=documents,
        contents={"model.language": llm.digest, "model.image_tokenizer": codes}
        | _contents("data.shards", shard_files(config.data.shards), what=f"{len(drawn or ())} pictures")
        | _contents("data.pairs", shard_files(config.data.pairs), what=f"{len(pairs or ())} pictures")
        | _contents("data.documents", config.data.documents if documents else (), what=f"{len(documents)} documents"),
    )
    if source.start_from is not None:
        path = source.start_from / "visual.safetensors"
        found, wanted = read_tensors(path), transformer.visual_tensors()
        if pairs and LOW_PROJECTION not in found:
            del wanted[LOW_PROJECTION]  # it starts at zero
        copy_tensors(found, into=wanted, where=str(path))
    return opened


def _fitted(
    config: StageConfig, shapes: ModelConfig, *, grids: tuple[tuple[int, int], ...], pairs: Loader | None
) -> tuple[ModelConfig, tuple[tuple[int, int], ...]]:
    """Shapes of the model that a stage trains, and the grids that it draws, if they suit each other.

    Args:
        grids: of the pictures that all tasks but `upscale` learn.
        pairs: pictures in two sizes, where the task `upscale` is learned.
    """
    for grid in {*grids, *(() if pairs is None else pairs.grids)}:
        shapes.semvie.check_grid(*grid)
    if "top_rows" in config.mix and config.top_rows % shapes.semvie.cell:
        raise ConfigError(f"top_rows must be a multiple of semvie.cell, {shapes.semvie.cell}, got {config.top_rows}")
    if pairs is None:
        return shapes, grids
    shapes = replace(shapes, semvie=replace(shapes.semvie, low_input=True))
    low = _low_grids(config, shapes.semvie, pairs.grids)
    if not config.data.pairs:
        return shapes, low
    if not set(low) <= set(grids):
        raise ConfigError(f"data.shards must hold pictures of the smaller sizes of data.pairs, {low}, got {grids}")
    return shapes, grids


def _low_grids(
    config: StageConfig, semvie: SemVIEConfig, grids: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """The smaller grids of those that are drawn, if blocks and cells suit both."""
    scale, cell = config.upscale.scale, semvie.cell
    if scale % cell:
        raise ConfigError(f"upscale.scale must be a multiple of semvie.cell, {cell}, got {scale}")
    for rows, columns in grids:
        drawing_order(rows, columns, side=config.upscale.side, cell=cell)  # blocks must fill it
        semvie.check_grid(rows // scale, columns // scale)
    return tuple((rows // scale, columns // scale) for rows, columns in grids)


def check_model(folder: Path, *, shapes: ModelConfig, llm: tuple[str, str], codec: ImageTokenizerConfig) -> None:
    """Whether the visual expert of a model's folder can be continued.

    Args:
        llm: source and digest of the LLM that it will stand beside.
        codec: of the image tokenizer.

    Raises:
        CheckpointError: if it has other shapes, or was trained with another LLM or image tokenizer.
    """
    info, found = read_info(folder)
    check_image_tokenizer(codec, num_codes=found.num_codes, factor=info.factor, where=str(folder))
    source, digest = llm
    if info.language_digest != digest:
        raise CheckpointError(
            f"{folder} was trained on the LLM {info.language_digest[:19]}…, but {source} is {digest[:19]}…"
        )
    if found != shapes:
        raise CheckpointError(f"{folder} has other shapes than the configuration; make [model.semvie] the same")


def _open_language(
    source: ModelSource, info: ModelInfo | None, *, notify: Callable[[str], None] | None
) -> tuple[BaseLLM, str, str | None]:
    """The LLM that is named, or that of the model to start from; its source and revision."""
    language, revision = source.language or LANGUAGE, source.revision
    if source.language is None and info is not None and source.start_from is not None:
        language, revision = language_source(info, folder=source.start_from), info.language_revision
    return open_base_llm(language, revision=revision, notify=notify), language, revision


def _open_shards(config: StageConfig, *, wanted: str, codec: Path) -> Loaders:
    """All that a configuration asks for.

    Args:
        wanted: the digest that all codes must have, which is that of `codec`.
    """
    data, upscales = config.data, "upscale" in config.mix

    def open_splits(*splits: str, kinds: dict[str, float], shards: tuple[Path, ...], paired: bool) -> Loader:
        scale = config.upscale.scale if paired else None
        loader = Loader(shards, seed=config.seed, kinds=kinds, languages=data.languages, splits=splits, scale=scale)
        if loader.image_tokenizer != wanted:
            raise CheckpointError(
                f"the shards hold codes of image tokenizer {loader.image_tokenizer[:19]}…, but "
                f"{codec} is {wanted[:19]}…; encode the pictures again"
            )
        return loader

    apart = bool(data.pairs)
    of_shards = partial(open_splits, shards=data.repeated, paired=upscales and not apart)
    drawn = of_shards("train", kinds=data.kinds)
    other = data.described if "captioning" in config.mix else {}
    pairs = open_splits("train", kinds=data.kinds, shards=data.pairs, paired=True) if apart and upscales else drawn
    return Loaders(
        drawn=drawn,
        described=of_shards("train", kinds=other) if other else drawn,
        pairs=pairs if upscales else None,
        held_out=of_shards(*data.held_out, kinds=data.kinds) if data.held_out else None,
    )


def _open_documents(config: StageConfig, *, wanted: str, codec: Path) -> tuple[Document, ...]:
    """Those that the tasks of a stage learn or measure."""
    paths = config.data.documents
    if not set(DOCUMENT_TASKS) & config.mix.keys():
        return ()
    documents, found = read_all_documents(paths)
    if found != wanted:
        raise CheckpointError(
            f"{', '.join(map(str, paths))} hold codes of image tokenizer {found[:19]}…, but "
            f"{codec} is {wanted[:19]}…; make them again"
        )
    return tuple(one for one in documents if ("editing" if one.is_edit else "interleaved") in config.mix)


def _drawn_grids(documents: Sequence[Document]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the images that documents draw.

    Raises:
        DataError: if there are none.
    """
    parts = [part for one in documents if one.split == "train" for part in one.parts]
    drawn = [part.codes.shape for part in parts if isinstance(part, CodedImage) and part.role == "drawn"]
    if not drawn:
        raise DataError("data.documents must hold an image to draw, got none; set data.shards, or other documents")
    return tuple(sorted({(rows, columns) for rows, columns in drawn}))


def _contents(name: str, files: Sequence[Path], *, what: str) -> dict[str, str]:
    return {name: f"{what}, {files_digest(files)[:19]}"} if files else {}
