"""One layer against an independent computation, position by position and head by head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.model.layers import Expert
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import Modality, Segment

Build = Callable[..., MarsTransformer]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"share_norms": False},
    {"duplicate_output": False},
    {"share_norms": False, "duplicate_output": False},
    {"share_norms": False, "visual_width": 16, "visual_ffn": 24, "init": "random"},
]
LANGUAGES: list[dict[str, Any]] = [{}, {"qkv_bias": True}, {"qk_norm": True}]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt() * weight


def turn(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    angle = position * 10000.0 ** -(torch.arange(half) / half)
    pair = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([pair.real, pair.imag])


def by_hand(layer: SemVIELayer, xs: list[Tensor], modalities: list[Modality]) -> list[Tensor]:
    """The layer's output of each position of one row."""
    assert layer.visual is not None
    language, queries, keys, values, outs = layer.language, [], [], [], []
    for at, (x, modality) in enumerate(zip(xs, modalities, strict=True)):
        expert = language if modality is Modality.TEXT else layer.visual
        norms = expert if "attention_norm" in dict(expert.named_children()) else language
        h = rms(x, norms.attention_norm.weight)

        def heads(name: str, norm: str | None, expert: Expert = expert, norms: Expert = norms, h: Tensor = h) -> Tensor:
            projection = getattr(expert, name)
            flat = projection.weight @ h + (0 if projection.bias is None else projection.bias)
            rows = flat.view(-1, 8)
            return torch.stack([rms(row, getattr(norms, norm).weight) for row in rows]) if norm else rows

        normed = hasattr(language, "q_norm")
        queries.append(torch.stack([turn(row, at) for row in heads("q_proj", "q_norm" if normed else None)]))
        keys.append(torch.stack([turn(row, at) for row in heads("k_proj", "k_norm" if normed else None)]))
        values.append(heads("v_proj", None))
        mixed = []
        for head in range(4):
            scores = torch.stack([queries[at][head] @ keys[j][head // 2] / 8**0.5 for j in range(at + 1)])
            mixed.append(
                (scores.softmax(0)[:, None] * torch.stack([values[j][head // 2] for j in range(at + 1)])).sum(0)
            )
        output = expert if "o_proj" in dict(expert.named_children()) else language
        x = x + output.o_proj.weight @ torch.cat(mixed)
        h = rms(x, norms.ffn_norm.weight)
        gate = expert.gate_proj.weight @ h
        outs.append(x + expert.down_proj.weight @ (gate * torch.sigmoid(gate) * (expert.up_proj.weight @ h)))
    return outs


@pytest.mark.parametrize("language", LANGUAGES, ids=["llama", "bias", "qk-norm"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "paper")
@torch.no_grad()
def test_each_position_takes_its_experts_weights_and_meets_the_others_in_attention(
    build: Build, options: dict[str, Any], language: dict[str, Any]
) -> None:
    transformer = build(language=language, **options)
    layer = transformer.layers[1]
    assert isinstance(layer, SemVIELayer)
    cache = transformer.new_cache()
    xs: list[Tensor] = []
    modalities: list[Modality] = []
    found: list[Tensor] = []
    for modality, length in ((Modality.TEXT, 3), (Modality.IMAGE, 4), (Modality.TEXT, 2)):
        width = 32 if modality is Modality.TEXT else transformer.config.visual_width
        x = torch.randn(1, length, width)
        segment = Segment(modality=modality, ids=torch.zeros(1, length, dtype=torch.long))
        positions = cache.begin(segment)
        rotary = transformer.rotary.at(positions, longest=16, dtype=torch.float32)
        found += layer(x, modality, cache=cache, rotary=rotary, mask=cache.sight(segment)[True])[0]
        xs += x[0]
        modalities += [modality] * length
    for one, wanted in zip(found, by_hand(layer, xs, modalities), strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)


def test_an_image_passes_a_layer_without_a_visual_expert_unchanged(build: Build) -> None:
    layer = build(visual_layers=(0, 2)).layers[1]
    assert isinstance(layer, SemVIELayer)
    assert layer.visual is None
    x = torch.randn(1, 2, 32)
    cache = build(visual_layers=(0, 2)).new_cache()
    assert layer(x, Modality.IMAGE, cache=cache, rotary=torch.zeros(2, 1, 1, 2, 8), mask=None) is x
    assert cache.keys[1] is None
