from dataclasses import replace

import pytest
import torch

from mars.errors import ModelError
from mars.model.config import LanguageConfig
from mars.model.language_tensors import GGUF, HUB_QWEN, check_shapes, hub_name, language_shapes, tensors_digest


def test_names_here_on_the_hub_and_in_gguf() -> None:
    name = "layers.11.language.q_norm.weight"
    assert hub_name(name) == "model.layers.11.self_attn.q_norm.weight"
    assert GGUF.name(name) == "blk.11.attn_q_norm.weight"
    assert (hub_name("language_head.weight"), GGUF.name("language_head.weight")) == (
        "lm_head.weight",
        "output.weight",
    )


def test_fused_projections_lie_below_each_other(tiny_config: LanguageConfig) -> None:
    places, stored = HUB_QWEN.places(language_shapes(replace(tiny_config, qkv_bias=True)))
    found = [places[f"layers.1.language.{part}_proj.weight"] for part in "qkv"]
    assert [(place.start, place.stop) for place in found] == [(0, 32), (32, 48), (48, 64)]
    assert {place.tensor for place in found} == {"transformer.h.1.attn.c_attn.weight"}
    assert stored["transformer.h.1.attn.c_attn.weight"] == (64, 32)
    assert stored["transformer.h.1.attn.c_attn.bias"] == (64,)
    assert stored["transformer.h.1.attn.c_proj.weight"] == (32, 32)


def test_options_add_their_tensors(tiny_config: LanguageConfig) -> None:
    plain = language_shapes(tiny_config).keys()
    full = language_shapes(replace(tiny_config, tied_embeddings=False, qkv_bias=True, qk_norm=True)).keys()
    first = {name for name in full - plain if ".1." not in name}
    layer = "layers.0.language."
    parts = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight")
    assert first == {
        "language_head.weight",
        *(layer + part for part in parts),
    }


def test_the_digest_ignores_order_and_layout_and_nothing_else() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    digest = tensors_digest({"a": a, "b": b})
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    assert tensors_digest({"b": torch.nn.Parameter(b), "a": a.T.contiguous().T}) == digest
    for other in (
        {"a": a},
        {"a": a, "c": b},
        {"a": a.reshape(4, 3), "b": b},
        {"a": a.to(torch.bfloat16), "b": b},
        {"a": a, "b": b + 1},
    ):
        assert tensors_digest(other) != digest


def test_the_same_shapes_pass_and_others_are_named() -> None:
    expected = {"a": (1, 2), "b": (3,)}
    check_shapes({"a": [1, 2], "b": [3]}, expected=expected, source="file")
    with pytest.raises(ModelError, match=r"^file must hold tensor a \(and 1 more\), got none"):
        check_shapes({}, expected=expected, source="file")
    with pytest.raises(ModelError, match=r"^file holds tensor c, which"):
        check_shapes({"a": [1, 2], "b": [3], "c": []}, expected=expected, source="file")
    with pytest.raises(ModelError, match=r"tensor b must have shape \(3,\).*got \(4,\)"):
        check_shapes({"a": [1, 2], "b": [4]}, expected=expected, source="file")
