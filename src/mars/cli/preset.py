"""What `mars info --preset NAME` shows: a model's sizes and costs, without its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import ModelConfig, SemVIEConfig
from mars.model.costs import (
    STORAGES,
    FlopCount,
    cache_bytes,
    count_parameters,
    image_tokenizer_flops,
    meta_image_tokenizer,
    meta_transformer,
    weight_bytes,
)
from mars.model.presets import Preset, find_preset
from mars.model.transformer import MarsTransformer
from mars.training.planner import PAPER_PAIRS, TYPICAL_UTILISATION, paper_stages, plan

PROMPT = 44
"""Ids of the prompt that a drawing is counted for, as in stage I."""
BIG = 10**12
"""Numbers from here on are written with a power of ten."""


def describe_preset(
    name: str,
    *,
    gpu: str = "a100",
    utilisation: float = TYPICAL_UTILISATION,
    pairs: Sequence[int] = PAPER_PAIRS,
) -> dict[str, Any]:
    """Sections of figures by name: parameters, bytes, cache, FLOPs and the plan of a training.

    Args:
        gpu, utilisation: what the training is planned for.
        pairs: of text and image in each of the three stages.

    Raises:
        RequestError: if there is no such preset or GPU, or a number cannot be.
    """
    preset = find_preset(name)
    transformer = meta_transformer(preset.model)
    codec = meta_image_tokenizer(preset.image_tokenizer)
    return {
        "preset": preset.name,
        "what it is": preset.note,
        "vocabulary": _vocabulary(transformer),
        "parameters": _parameters(transformer, codec),
        "visual expert under other options": _options(preset),
        "bytes": _bytes(transformer, codec),
        "cache bytes per token and row": {
            name: cache_bytes(transformer, itemsize=size) for name, size in (("fp32", 4), ("bf16", 2))
        },
        "FLOPs are counted for": _counted_for(preset),
        "FLOPs": _flops(preset, FlopCount(transformer)),
        **plan(preset, gpu=gpu, utilisation=utilisation, pairs=pairs),
    }


def _parameters(transformer: MarsTransformer, codec: ImageTokenizer) -> dict[str, int]:
    parts = count_parameters(transformer)
    language = parts["language layers"] + parts["language tables"]
    visual = parts["visual layers"] + parts["visual tables"]
    pictures = sum(weight.numel() for weight in codec.parameters())
    sums = {"language expert": language, "visual expert": visual, "image tokenizer": pictures}
    return parts | sums | {"all": sum(sums.values())}


def _vocabulary(transformer: MarsTransformer) -> dict[str, int]:
    vocabulary = transformer.vocabulary
    used = vocabulary.text_size + vocabulary.num_codes
    specials = vocabulary.size - used
    return {"text ids": vocabulary.text_size, "codes": vocabulary.num_codes, "special and dead ids": specials} | {
        "all": vocabulary.size
    }


def _options(preset: Preset) -> dict[str, Any]:
    """The visual expert's size under each choice that the paper leaves open, and under those that it does not make."""
    language = preset.model.language
    half = SemVIEConfig(
        share_norms=False, visual_width=language.width // 2, visual_ffn=language.ffn // 2, init="random"
    )
    fourth = tuple(range(3, language.num_layers, 4))
    choices = {
        "the default": SemVIEConfig(),
        "its own norms": SemVIEConfig(share_norms=False),
        "the LLM's output projection": SemVIEConfig(duplicate_output=False),
        "half as wide": half,
        "every fourth layer": SemVIEConfig(visual_layers=fourth),
        "half as wide, every fourth layer": replace(half, visual_layers=fourth),
    }
    if preset.model.semvie not in choices.values():
        choices = {"this preset": preset.model.semvie} | choices
    return {name: _option(replace(preset.model, semvie=semvie)) for name, semvie in choices.items()}


def _option(config: ModelConfig) -> dict[str, int]:
    transformer = meta_transformer(config)
    parts, count = count_parameters(transformer), FlopCount(transformer)
    return {
        "width": config.visual_width,
        "feed-forward": config.visual_ffn,
        "layers": len(config.visual_layers),
        "parameters": parts["visual layers"] + parts["visual tables"],
        "with the LLM": sum(parts.values()),
        "FLOPs per code": count.image_linear // count.slots + count.cell + count.image_head,
    }


def _bytes(transformer: MarsTransformer, codec: ImageTokenizer) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, storage in STORAGES.items():
        sizes = weight_bytes(transformer, codec, storage)
        sums = {key: sizes.pop(key) for key in ("kept after the prompt", "read per code")}
        table[name] = sizes | {"all": sum(sizes.values())} | sums
    return table


def _counted_for(preset: Preset) -> dict[str, Any]:
    (rows, columns), factor = preset.grid, preset.image_tokenizer.factor
    captions = [stage.caption for stage in paper_stages(preset.grid)]
    return {
        "picture": f"{columns * factor}x{rows * factor}",
        "its codes": rows * columns,
        "after super-resolution": f"{2 * columns * factor}x{2 * rows * factor}",
        "ids of a prompt": PROMPT,
        "ids of a caption in stages I, II, III": ", ".join(map(str, captions)),
    }


def _flops(preset: Preset, count: FlopCount) -> dict[str, int]:
    codes = prod(preset.grid)
    encode, decode = image_tokenizer_flops(preset.image_tokenizer, grid=preset.grid)
    large = (2 * preset.grid[0], 2 * preset.grid[1])
    first, second, third = paper_stages(preset.grid)
    low = codes // count.slots + 1
    draw = {guided: count.draw(prompt=PROMPT, codes=codes, guided=guided) for guided in (False, True)}
    upscale = count.draw(prompt=PROMPT, codes=prod(large), guided=True, low=low)
    return {
        "picture without guidance": draw[False] + decode,
        "picture with guidance": draw[True] + decode,
        "reading the prompt, of these": count.read_text(PROMPT),
        "codes to pixels, of these": decode,
        "super-resolution, guided": upscale + image_tokenizer_flops(preset.image_tokenizer, grid=large)[1],
        "picture to codes": encode,
        "trained sample, stage I, text to image": count.train_text_to_image(caption=first.caption, codes=codes),
        "trained sample, stage I, image to text": count.train_captioning(caption=first.caption, codes=codes),
        "trained sample, stage II": count.train_text_to_image(caption=second.caption, codes=codes),
        "trained sample, stage III": count.train_text_to_image(caption=third.caption, codes=prod(large), low=low),
    }


def render_preset(table: Mapping[str, Any]) -> str:
    """`describe_preset` as text: aligned pairs, tables with a row per name, and lists."""
    lines: list[str] = []
    for name, section in table.items():
        if isinstance(section, Mapping):
            lines += ["", name]
            nested = any(isinstance(value, Mapping) for value in section.values())
            lines += _grid(section) if nested else _pairs(section)
        elif isinstance(section, list):
            lines += ["", name, *(f"  - {line}" for line in section)]
        else:
            lines.append(f"{name:<12}{section}")
    return "\n".join(lines)


def _pairs(section: Mapping[str, Any]) -> list[str]:
    width, cells = max(map(len, section)), [_number(value) for value in section.values()]
    right = max(map(len, cells))
    return [f"  {name:<{width}}  {cell:>{right}}" for name, cell in zip(section, cells, strict=True)]


def _grid(section: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in section.values() for key in row))
    body = [[name, *(_number(row[key]) if key in row else "" for key in columns)] for name, row in section.items()]
    rows = [["", *columns], *body]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, aligned, strict=True)]


def _number(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    if abs(value) >= BIG:
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 100 else f"{value:,.1f}"
