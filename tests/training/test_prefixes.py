from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mars.model.config import LanguageConfig, ModelConfig
from mars.model.language_tensors import language_shapes
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.training.losses import text_to_image_loss
from mars.training.prefixes import PrefixStore
from tests.training.conftest import gradients

ROWS = [[1, 40, 41, 42], [1], [1, 50, 51], [1, 40, 41, 42]]
CODES = torch.arange(24).view(4, 2, 3)


def store_bytes(store: PrefixStore) -> int:
    """Recounts what a store holds."""
    held = [part for prefix in store.prefixes.values() for part in (prefix.keys, prefix.values, prefix.last_hidden)]
    return sum(part.numel() * part.element_size() for part in held)


def test_a_store_gives_the_loss_and_gradients_of_no_store(transformer: MarsTransformer) -> None:
    store = PrefixStore(transformer, gib=1)
    store.get([[1, 40], [1, 50, 51]])
    for _ in range(2):  # computed, then remembered
        loss = text_to_image_loss(transformer, CODES, store.get(ROWS))
        wanted = text_to_image_loss(transformer, CODES, read_prefixes(transformer, ROWS))
        assert torch.allclose(loss, wanted, rtol=1e-6)
        found, right = gradients(transformer, loss), gradients(transformer, wanted)
        assert all(torch.allclose(found[name], right[name], rtol=1e-3, atol=1e-5) for name in right)


def test_a_store_remembers_and_forgets_the_least_used_first(transformer: MarsTransformer) -> None:
    store = PrefixStore(transformer, gib=1)
    first, again = store.get([ROWS[0]])[0], store.get([ROWS[2], ROWS[0]])[1]
    assert again is first
    one = store.held // 7 * 4  # seven positions are held, give or take the last states
    store = PrefixStore(transformer, gib=2.5 * one / 2**30)
    for start in range(40, 48):
        assert len(store.get([[1, start, start, start]])) == 1
        if start > 40:
            store.get([[1, 41, 41, 41]])
        assert store.held <= store.limit
    assert set(store.prefixes) == {(1, 41, 41, 41), (1, 47, 47, 47)}
    assert store.held == store_bytes(store)
    assert len(PrefixStore(transformer, gib=0).get(ROWS)) == len(ROWS)


def test_a_store_reads_ahead_what_fits_and_only_when_it_reads_at_all(transformer: MarsTransformer) -> None:
    store = PrefixStore(transformer, gib=1)
    store.get([ROWS[0]], ahead=ROWS[1:])
    assert set(store.prefixes) == {tuple(row) for row in ROWS}
    store.get([ROWS[0]], ahead=[[1, 55]])
    assert (1, 55) not in store.prefixes
    small = PrefixStore(transformer, gib=3 * store_bytes(store) / 2**30)
    small.get([ROWS[0]], ahead=[[1, *range(20, 20 + length)] for length in range(1, 30)])
    assert 1 < len(small.prefixes) < 29
    assert small.held == store_bytes(small) <= small.limit


def test_long_captions_of_many_lengths_are_not_read_beside_mostly_filler(build_tiny: Callable[..., Any]) -> None:
    transformer = build_tiny()
    rows = [[1 + row] * (60 + 2 * row) for row in range(16)]
    with FlopCounterMode(display=False) as apart:
        read_prefixes(transformer, rows)
    with FlopCounterMode(display=False) as stored:
        PrefixStore(transformer, gib=1).get(rows)
    assert stored.get_total_flops() < 5 * apart.get_total_flops()


def test_a_caption_leaves_the_same_prefix_whatever_is_read_beside_it() -> None:
    shapes = LanguageConfig(
        vocab_size=60, width=576, num_layers=2, num_heads=9, num_kv_heads=3, head_width=64, ffn=1536, rope_theta=1e4,
        norm_eps=1e-5, max_positions=64, tied_embeddings=True,
    )  # fmt: skip
    weights = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in language_shapes(shapes).items()}
    transformer = build_transformer(ModelConfig(language=shapes, num_codes=8), weights)
    rows = [[1] + [10 + row] * (3 + row) for row in range(16)] + [[1] + [row] * 59 for row in range(9)]
    fresh, resumed = PrefixStore(transformer, gib=1), PrefixStore(transformer, gib=1)
    together = fresh.get(rows)
    for row, wanted in zip(rows, together, strict=True):
        assert torch.equal(resumed.get([row])[0].keys, wanted.keys)


def test_processes_that_share_weights_read_equally_often(
    transformer: MarsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they agree before they read: each read needs all of them."""
    events: list[int | str] = []
    forward = transformer.forward

    def noted(*arguments: Any) -> Tensor:
        events.append("read")
        return forward(*arguments)

    monkeypatch.setattr(transformer, "forward", noted)

    def most(own: int) -> int:
        events.append(own)
        return 3

    store = PrefixStore(transformer, gib=1, most=most)
    store.get(ROWS)
    assert events == [1, "read", "read", "read"]
    events.clear()
    store.get(ROWS)
    assert events == [0, "read", "read", "read"]
