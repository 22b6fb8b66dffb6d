from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.model.cache import Cache
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.interleaved import Document, ImagePart, TextPart, interleaved
from mars.sequence.layout import Modality, Segment
from mars.training.interleaved import interleaved_losses, interleaved_states
from mars.training.losses import begin_image_loss, captioning_loss, text_to_image_loss

CODES = torch.arange(24).view(4, 2, 3)
ROWS = [[1, 40, 41, 42], [1], [1, 50, 51], [1, 40, 41, 42]]


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def segments_of(transformer: MarsTransformer, *documents: Document) -> list[Segment]:
    return interleaved(documents, transformer.vocabulary, end=2)


def story(first: Tensor, *, short: bool = False) -> Document:
    return [
        TextPart(ids=(1, 40, 41)[: 1 if short else 3]),
        ImagePart(codes_RC=first),
        TextPart(ids=(50,) if short else (50, 51, 52)),
        ImagePart(codes_RC=CODES[2]),
        TextPart(ids=(60, 61)),
    ]


def edit(source: Tensor) -> Document:
    instruction = TextPart(ids=(40, 41), learned=False)
    return [ImagePart(codes_RC=source, role="source"), instruction, ImagePart(codes_RC=CODES[1])]


def gradients(transformer: MarsTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


def test_a_text_and_an_image_are_text_to_image(transformer: MarsTransformer) -> None:
    documents: list[Document] = [
        [TextPart(ids=tuple(row)), ImagePart(codes_RC=codes)] for row, codes in zip(ROWS, CODES, strict=True)
    ]
    losses = interleaved_losses(transformer, segments_of(transformer, *documents))
    prefixes = read_prefixes(transformer, ROWS)
    assert losses.keys() == {"image_loss", "loss", "total", "begin_image_loss"}
    assert torch.equal(losses["image_loss"], losses["loss"])
    assert torch.allclose(losses["image_loss"], text_to_image_loss(transformer, CODES, prefixes), rtol=1e-5)
    assert torch.allclose(losses["begin_image_loss"], begin_image_loss(transformer, prefixes), rtol=1e-5)
    found = gradients(transformer, losses["total"])
    wanted = gradients(transformer, text_to_image_loss(transformer, CODES, prefixes))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_an_image_and_a_text_are_captioning(transformer: MarsTransformer) -> None:
    documents: list[Document] = [
        [ImagePart(codes_RC=codes, role="read"), TextPart(ids=tuple(row))]
        for row, codes in zip(ROWS, CODES, strict=True)
    ]
    losses = interleaved_losses(transformer, segments_of(transformer, *documents))
    assert losses.keys() == {"text_loss", "loss", "total"}
    wanted = captioning_loss(transformer, CODES, ROWS, hints=[[]] * 4, end=2)
    assert torch.allclose(losses["text_loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize("document", [story(CODES[0]), edit(CODES[0])])
def test_gradients_reach_visual_tensors_only(transformer: MarsTransformer, document: Document) -> None:
    losses = interleaved_losses(transformer, segments_of(transformer, document))
    found = gradients(transformer, losses["total"] + losses["begin_image_loss"])
    assert found.keys() <= transformer.visual_tensors().keys()
    experts = {name for name in transformer.visual_tensors() if ".visual." in name}
    assert all(bool(found[name].any()) for name in experts)
    assert bool(found["special_embedding.weight"].any())


@pytest.mark.parametrize(("write", "kinds"), [(story, ["image", "text", "begin"]), (edit, ["image", "begin"])])
def test_what_follows_depends_on_the_images_before(
    transformer: MarsTransformer, write: Callable[[Tensor], Document], kinds: list[str]
) -> None:
    one, other = (interleaved_states(transformer, segments_of(transformer, write(codes))) for codes in CODES[:2])
    for kind in kinds:
        assert not torch.allclose(one[kind].states_ND[-1], other[kind].states_ND[-1], atol=1e-3)


def test_the_loss_of_a_text_trains_the_image_before_it_through_the_frozen_layers(transformer: MarsTransformer) -> None:
    document: Document = [ImagePart(codes_RC=CODES[0], role="read"), TextPart(ids=(60, 61))]
    losses = interleaved_losses(transformer, segments_of(transformer, document))
    found = gradients(transformer, losses["total"])
    assert any(bool(found[name].any()) for name in found if ".visual.v_proj" in name)


def test_the_total_is_the_mean_over_codes_and_text_ids(transformer: MarsTransformer) -> None:
    losses = interleaved_losses(transformer, segments_of(transformer, story(CODES[0])))
    assert torch.allclose(losses["loss"], (12 * losses["image_loss"] + 6 * losses["text_loss"]) / 18, rtol=1e-5)
    assert torch.allclose(losses["loss"], losses["total"], rtol=1e-5)
    more = interleaved_losses(transformer, segments_of(transformer, story(CODES[0])), z_loss=0.1)
    assert float(more["total"].detach()) > float(losses["total"].detach()) + 0.01
    assert torch.equal(more["loss"], losses["loss"])


def test_the_first_text_builds_no_graph(transformer: MarsTransformer) -> None:
    states = interleaved_states(
        transformer, segments_of(transformer, [TextPart(ids=(1, 40)), ImagePart(codes_RC=CODES[0])])
    )
    assert not states["begin"].states_ND.requires_grad
    assert states["image"].states_ND.requires_grad


def test_a_batch_is_the_mean_of_its_rows(transformer: MarsTransformer) -> None:
    documents = [story(CODES[0]), story(CODES[1], short=True)]
    together = interleaved_losses(transformer, segments_of(transformer, *documents))
    alone = [interleaved_losses(transformer, segments_of(transformer, document)) for document in documents]
    for name, shares in {"image_loss": (1, 1), "begin_image_loss": (1, 1), "text_loss": (6, 4)}.items():
        wanted = sum(share * losses[name] for share, losses in zip(shares, alone, strict=True)) / sum(shares)
        assert torch.allclose(together[name], torch.as_tensor(wanted), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("document", [story(CODES[0]), edit(CODES[0])])
def test_one_position_after_the_other_gives_what_whole_segments_give(
    transformer: MarsTransformer, document: Document
) -> None:
    segments = segments_of(transformer, document)
    whole: Cache = transformer.new_cache()
    single = transformer.new_static_cache(batch=1, size=64)
    for segment in segments:
        wanted = transformer(segment, whole)
        for place in range(segment.ids.shape[1]):
            start = place if segment.modality is Modality.IMAGE else 0
            one = Segment(modality=segment.modality, ids=segment.ids[:, [place]], columns=segment.columns, start=start)
            assert torch.allclose(transformer(one, single)[:, 0], wanted[:, place], atol=1e-4)
