"""Weights that training of the visual side starts from.

Letters: V codes, Z code width, D width.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from mars.model.layers import Expert
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment

NOISE = 0.02
"""Deviation of the noise on visual rows, as a share of the text embeddings' own where the widths are equal."""

NARROW_INPUT = 0.3
"""Standard deviation of the input tables of a visual expert that is narrower than the LLM."""


@torch.no_grad()
def start_visual(
    transformer: MarsTransformer, *, generator: torch.Generator, codebook_VZ: Tensor | None = None
) -> None:
    """Gives the visual side its starting weights.

    Tables start at the mean of the text embeddings plus a little noise. A table narrower than the LLM's, where no such
    mean exists, starts at noise, or (ours) at a random projection of the image tokenizer's codebook: codes that look
    alike then start alike. Experts start as a copy of the LLM's layers, or at random with silent outputs.
    """
    config = transformer.config
    _start_tables(transformer, generator=generator, codebook_VZ=codebook_VZ)
    if config.semvie.cell > 1:
        transformer.visual_cells.start(generator)
    for language, visual in _layer_pairs(transformer):
        if config.semvie.init == "copy":
            wanted = language.state_dict()
            for name, weight in visual.named_parameters():
                weight.copy_(wanted[name])
        else:
            _start_random(visual, generator)
    if config.semvie.head_norms:
        _start_head_norms(transformer, generator)


def _start_tables(transformer: MarsTransformer, *, generator: torch.Generator, codebook_VZ: Tensor | None) -> None:
    """Tables, and norms that belong to no expert."""
    config, text = transformer.config, transformer.language_embedding.weight
    mean, deviation, rows = text.mean(dim=0), float(text.std()), transformer.vocabulary.visual_rows
    for name, weight in transformer.visual_tensors().items():
        if ".visual." in name or name.startswith("visual_cells."):
            continue
        if weight.dim() == 1:
            weight.copy_(transformer.language_norm.weight if len(weight) == len(mean) else torch.ones_like(weight))
            continue
        if name.startswith("low_projection"):
            weight.zero_()  # what was trained without it goes on as it was
            continue
        weight.normal_(0, 1, generator=generator)
        if name.startswith("visual_grid"):
            weight.mul_(0 if config.semvie.init == "copy" else NARROW_INPUT)
            continue
        slots = max(1, len(weight) // rows)
        if weight.shape[1] == len(mean) and not (config.semvie.cell > 1 and name.startswith("visual_head")):
            weight.mul_(deviation * NOISE).add_(mean / slots)
        else:
            if codebook_VZ is not None:
                for first in range(0, len(weight), rows):
                    weight[first : first + len(codebook_VZ)] = _project(codebook_VZ, weight.shape[1], generator)
            weight.mul_(NOISE if name.startswith("visual_head") else NARROW_INPUT * slots**-0.5)


def _start_head_norms(transformer: MarsTransformer, generator: torch.Generator) -> None:
    """Keys and values of images start as large as those of text, measured on random ids after each row's first (which
    LLMs use as a sink); queries so that scores, whose deviation is the product of both, start at 1."""
    ids = torch.randint(transformer.config.language.vocab_size, (8, 32), generator=generator)
    cache = transformer.new_cache()
    transformer(Segment(modality=Modality.TEXT, ids=ids), cache)
    for layer in transformer.layers:
        assert isinstance(layer, SemVIELayer)
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        if layer.visual is not None and keys is not None and values is not None:
            key_size, value_size = (float(found[:, :, 1:].square().mean().sqrt()) for found in (keys, values))
            layer.visual.q_norm.weight.fill_(1 / key_size)
            layer.visual.k_norm.weight.fill_(key_size)
            layer.visual.v_norm.weight.fill_(value_size)


def _project(codebook_VZ: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Codebook vectors of unit variance, turned at random into (V, width) of unit variance."""
    normal_VZ = (codebook_VZ - codebook_VZ.mean(dim=0)) / codebook_VZ.std()
    turn_ZD = torch.randn(codebook_VZ.shape[1], width, generator=generator) * codebook_VZ.shape[1] ** -0.5
    return cast(Tensor, normal_VZ @ turn_ZD)


def _layer_pairs(transformer: MarsTransformer) -> Iterator[tuple[Expert, Expert]]:
    for layer in transformer.layers:
        assert isinstance(layer, SemVIELayer)
        if layer.visual is not None:
            yield layer.language, layer.visual


def _start_random(expert: Expert, generator: torch.Generator) -> None:
    for name, weight in expert.named_parameters():
        if weight.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.startswith(("o_proj", "down_proj")):
            weight.zero_()  # every layer starts as the identity
        else:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
