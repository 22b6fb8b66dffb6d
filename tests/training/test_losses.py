from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mars.model.config import LanguageConfig, ModelConfig
from mars.model.language_tensors import language_shapes
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.sequence.layout import drawn_image, read_image, text_segment
from mars.training.losses import Neighbours, PrefixStore, begin_image_loss, captioning_loss, text_to_image_loss

ROWS = [[1, 40, 41, 42], [1], [1, 50, 51], [1, 40, 41, 42]]
CODES = torch.arange(24).view(4, 2, 3)


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def gradients(transformer: MarsTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


def test_text_to_image_is_the_mean_surprise_of_each_code(transformer: MarsTransformer) -> None:
    surprises = []
    for row, codes in zip(ROWS, CODES, strict=True):
        cache = transformer.new_cache()
        transformer(text_segment([row]), cache)
        hidden = transformer(drawn_image(codes[None], transformer.vocabulary), cache)
        shares = transformer.visual_logits(hidden)[0].detach().softmax(1)
        surprises += [-float(one[code].log()) for one, code in zip(shares, codes.flatten(), strict=True)]
    loss = text_to_image_loss(transformer, CODES, read_prefixes(transformer, ROWS))
    assert float(loss.detach()) == pytest.approx(sum(surprises) / 24, rel=1e-5)


def test_captioning_is_the_mean_surprise_of_each_text_id_and_of_the_end(transformer: MarsTransformer) -> None:
    hint, captions, surprises = [60, 61], [[70, 71, 72], [80]], []
    for caption, codes in zip(captions, CODES[:2], strict=True):
        cache = transformer.new_cache()
        transformer(read_image(codes[None], transformer.vocabulary), cache)
        text = text_segment([[transformer.vocabulary.image_end, *hint, *caption]])
        shares = transformer.text_logits(transformer(text, cache))[0].detach().softmax(1)
        surprises += [-float(one[target].log()) for one, target in zip(shares[2:], [*caption, 2], strict=True)]
    loss = captioning_loss(transformer, CODES[:2], captions, hints=[hint, hint], end=2)
    assert len(surprises) == 6
    assert float(loss.detach()) == pytest.approx(sum(surprises) / 6, rel=1e-5)


def test_begin_image_is_the_surprise_of_the_image_among_text_and_special_ids(transformer: MarsTransformer) -> None:
    prefixes = read_prefixes(transformer, ROWS)
    hidden = torch.stack([prefix.last_hidden for prefix in prefixes])
    logits = torch.cat([transformer.text_logits(hidden), transformer.special_logits(hidden)], dim=1)
    wanted = -logits.log_softmax(1)[:, transformer.config.language.vocab_size].mean()
    loss = begin_image_loss(transformer, prefixes)
    assert torch.allclose(loss, wanted, rtol=1e-5)
    assert gradients(transformer, loss).keys() == {"special_head.weight"}


def test_both_tasks_train_visual_tensors_only(transformer: MarsTransformer) -> None:
    drawing = gradients(transformer, text_to_image_loss(transformer, CODES, read_prefixes(transformer, ROWS)))
    writing = gradients(transformer, captioning_loss(transformer, CODES, ROWS, hints=[[60]] * 4, end=2))
    visual = transformer.visual_tensors().keys()
    assert drawing.keys() <= visual
    assert writing.keys() <= visual
    experts = {name for name in visual if ".visual." in name}
    assert experts <= drawing.keys()
    assert all(bool(drawing[name].any()) for name in experts)
    assert bool(writing["visual_embedding.weight"].any())
    assert bool(writing["special_embedding.weight"].any())
    read_keys = [name for name in experts if name.endswith(("k_proj.weight", "v_proj.weight"))]
    assert read_keys
    assert all(bool(writing[name].any()) for name in read_keys)


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


def test_a_caption_leaves_the_same_prefix_whatever_is_read_beside_it() -> None:
    shapes = LanguageConfig(
        vocab_size=60, width=576, num_layers=2, num_heads=9, num_kv_heads=3, head_width=64, ffn=1536, rope_theta=1e4,
        norm_eps=1e-5, max_positions=64, tied_embeddings=True,
    )  # fmt: skip
    weights = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in language_shapes(shapes).items()}
    transformer = build_transformer(ModelConfig(language=shapes, num_codes=8), weights)
    rows = [[1] + [10 + row] * (3 + row) for row in range(16)]
    fresh, resumed = PrefixStore(transformer, gib=1), PrefixStore(transformer, gib=1)
    together = fresh.get(rows)
    for row, wanted in zip(rows, together, strict=True):
        assert torch.equal(resumed.get([row])[0].keys, wanted.keys)


def test_a_code_without_neighbours_is_plain_cross_entropy() -> None:
    logits, codes = torch.randn(20, 12), torch.randint(12, (20,))
    alone = Neighbours(torch.randn(12, 3), count=1, spread=3.0)
    torch.testing.assert_close(alone.loss(logits, codes), F.cross_entropy(logits, codes))


def test_neighbours_share_a_target_by_their_distance() -> None:
    book, logits, codes = torch.randn(12, 3), torch.randn(20, 12), torch.randint(12, (20,))
    neighbours = Neighbours(book, count=5, spread=2.0)
    square = torch.cdist(book, book).square()
    unit = square.sort(dim=1).values[:, 1].median()
    near = square <= square.sort(dim=1).values[:, 4:5]
    targets = torch.where(near, torch.exp(-square / (2 * unit)), 0)
    targets = targets / targets.sum(dim=1, keepdim=True)
    torch.testing.assert_close(neighbours.loss(logits, codes), F.cross_entropy(logits, targets[codes]))
    assert neighbours.codes_VK[:, 0].tolist() == list(range(12))


def test_as_many_neighbours_as_codes_are_enough() -> None:
    neighbours = Neighbours(torch.randn(4, 3), count=64, spread=2.0)
    assert neighbours.codes_VK.shape == (4, 4)
