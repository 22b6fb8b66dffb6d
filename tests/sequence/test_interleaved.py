import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mars.sequence.interleaved import ImagePart, Part, TextPart, count_targets, interleaved, shape_of
from mars.sequence.layout import IGNORE, Modality, Segment, drawn_image, read_image, text_segment, written_text
from mars.sequence.vocabulary import IdRange, Vocabulary

VOCABULARY = Vocabulary(text_size=21, num_codes=13)
IMG, END_IMG, SOURCE, END_SOURCE = 34, 35, 38, 39
ONE, TWO = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])


def text(*ids: int, learned: bool = True) -> Part:
    return TextPart(ids=ids, learned=learned)


def image(codes: torch.Tensor, role: str = "drawn") -> Part:
    return ImagePart(codes_RC=codes, role=role)  # type: ignore[arg-type]


def shown(segments: list[Segment]) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of the first row."""
    return [
        (segment.ids[0].tolist(), [] if segment.targets is None else segment.targets[0].tolist())
        for segment in segments
    ]


def same(one: Segment, other: Segment) -> bool:
    pairs = [(vars(one)[name], vars(other)[name]) for name in vars(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_editing_reads_the_source_and_the_instruction_and_draws_the_result() -> None:
    document = [image(ONE, "source"), text(9, 8, learned=False), image(TWO)]
    assert shown(interleaved([document], VOCABULARY, end=2)) == [
        ([SOURCE, 22, 23, 24, 25], []),
        ([END_SOURCE, 9, 8], [IGNORE, IGNORE, IMG]),
        ([IMG, 26, 27], [26, 27, 28]),
    ]


def test_texts_and_images_take_turns() -> None:
    document = [text(1, 9), image(ONE), text(8, 7), image(TWO), text(6)]
    assert shown(interleaved([document], VOCABULARY, end=2)) == [
        ([1, 9], [IGNORE, IMG]),
        ([IMG, 22, 23, 24, 25], [22, 23, 24, 25, IGNORE]),
        ([END_IMG, 8, 7], [8, 7, IMG]),
        ([IMG, 26, 27, 28], [26, 27, 28, IGNORE]),
        ([END_IMG, 6], [6, 2]),
    ]


def test_between_two_images_stands_what_ends_the_first() -> None:
    document = [image(ONE, "source"), image(TWO, "source"), text(9, learned=False), image(TWO), image(ONE)]
    assert shown(interleaved([document], VOCABULARY, end=2))[1] == ([END_SOURCE], [IGNORE])
    assert shown(interleaved([document], VOCABULARY, end=2))[5] == ([END_IMG], [IMG])


rows = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=4)


@given(rows)
def test_a_text_and_an_image_are_text_to_image(texts: list[list[int]]) -> None:
    codes = torch.randint(13, (len(texts), 2, 3))
    documents = [[text(*ids), image(one)] for ids, one in zip(texts, codes, strict=True)]
    read, drawn = interleaved(documents, VOCABULARY, end=2)
    wanted = text_segment(texts)
    assert torch.equal(read.ids, wanted.ids)
    assert (read.mask is None) == (wanted.mask is None)
    assert same(drawn, drawn_image(codes, VOCABULARY))
    assert read.targets is not None
    for ids, targets in zip(texts, read.targets.tolist(), strict=True):
        assert targets[len(ids) - 1] == IMG
        assert {*targets[: len(ids) - 1], *targets[len(ids) :]} <= {IGNORE}


@given(rows)
def test_an_image_and_a_text_are_captioning(texts: list[list[int]]) -> None:
    codes = torch.randint(13, (len(texts), 2, 3))
    documents = [[image(one, "read"), text(*ids)] for ids, one in zip(texts, codes, strict=True)]
    read, written = interleaved(documents, VOCABULARY, end=2)
    assert same(read, read_image(codes, VOCABULARY))
    assert same(written, written_text(texts, VOCABULARY, hints=[[] for _ in texts], end=2))


parts = st.one_of(
    st.builds(TextPart, ids=st.tuples(st.integers(0, 20)), learned=st.booleans()),
    st.builds(lambda role: image(ONE, role), st.sampled_from(["drawn", "read", "source"])),
)


@given(st.lists(parts, min_size=1, max_size=6))
def test_every_segment_holds_one_modality_and_modalities_take_turns(document: list[Part]) -> None:
    for place in range(len(document) - 1, 0, -1):
        if isinstance(document[place], TextPart) and isinstance(document[place - 1], TextPart):
            del document[place]
    segments = interleaved([document], VOCABULARY, end=2)
    targets = [target for segment in segments if segment.targets is not None for target in segment.targets[0].tolist()]
    assert count_targets(document) == sum(target not in (IGNORE, IMG) for target in targets)
    for place, segment in enumerate(segments):
        found = {VOCABULARY.range_of(index) for index in segment.ids.flatten().tolist()}
        assert (IdRange.CODE in found) == (segment.modality is Modality.IMAGE)
        assert (IdRange.TEXT in found) <= (segment.modality is Modality.TEXT)
        assert place == 0 or segment.modality is not segments[place - 1].modality
        if segment.targets is not None:
            assert segment.targets.shape == segment.ids.shape


def test_documents_of_one_shape_may_differ_in_texts_and_codes_only() -> None:
    document = [text(1), image(ONE)]
    assert shape_of(document) == shape_of([text(2, 3), image(ONE + 1)])
    assert len({shape_of(other) for other in (document, [*document, text(1)], [text(1), image(TWO)])}) == 3
    assert shape_of(document) != shape_of([text(1), image(ONE, "read")])
    with pytest.raises(AssertionError, match="one shape"):
        interleaved([document, [text(1), image(TWO)]], VOCABULARY, end=2)
