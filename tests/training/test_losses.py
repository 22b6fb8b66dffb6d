import pytest
import torch

from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.layout import drawn_image, read_image, text_segment
from mars.training import cross_entropy
from mars.training.losses import begin_image_loss, begin_loss, captioning_loss, text_to_image_loss
from tests.training.conftest import gradients

ROWS = [[1, 40, 41, 42], [1], [1, 50, 51], [1, 40, 41, 42]]
CODES = torch.arange(24).view(4, 2, 3)


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


def test_when_to_begin_is_learned_without_all_logits_at_once(
    transformer: MarsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, size = torch.randn(20, transformer.config.language.width), transformer.config.language.vocab_size
    kept: list[int] = []

    def learn() -> tuple[float, torch.Tensor, torch.Tensor]:
        given = states.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):  # type: ignore[func-returns-value]
            loss = begin_loss(transformer, given)
        head = gradients(transformer, loss)["special_head.weight"]
        assert given.grad is not None
        return float(loss.detach()), given.grad, head

    wanted = learn()
    monkeypatch.setattr(cross_entropy, "CHUNK", 3 * size)
    made: list[int] = []
    logits = transformer.text_logits
    monkeypatch.setattr(transformer, "text_logits", lambda chunk: made.append(len(chunk)) or logits(chunk))  # type: ignore[func-returns-value]
    found = learn()
    assert max(made) == 3
    assert max(kept) < 20 * size
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


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
