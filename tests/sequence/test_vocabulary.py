import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars.errors import ConfigError
from mars.sequence.vocabulary import PADDING, SPECIALS, IdRange, Vocabulary

vocabularies = st.builds(Vocabulary, text_size=st.integers(1, 60), num_codes=st.integers(1, 60))


def test_the_papers_vocabulary_has_160136_ids() -> None:
    vocabulary = Vocabulary(text_size=151936, num_codes=8192)
    assert vocabulary.size == 160136
    assert vocabulary.visual_rows == 8200
    assert (vocabulary.image_start, vocabulary.image_end) == (160128, 160129)


@given(vocabularies)
def test_every_id_belongs_to_one_range_and_ranges_follow_each_other(vocabulary: Vocabulary) -> None:
    kinds = [vocabulary.range_of(index) for index in range(vocabulary.size)]
    counts = [kinds.count(kind) for kind in IdRange]
    assert kinds == [kind for kind, count in zip(IdRange, counts, strict=True) for _ in range(count)]
    assert counts[:3] == [vocabulary.text_size, vocabulary.num_codes, len(SPECIALS)]
    assert counts[3] < PADDING
    assert vocabulary.size % PADDING == 0


@given(vocabularies)
def test_the_named_ids_lie_in_their_ranges(vocabulary: Vocabulary) -> None:
    assert vocabulary.range_of(vocabulary.first_code) is IdRange.CODE
    assert vocabulary.range_of(vocabulary.first_code + vocabulary.num_codes - 1) is IdRange.CODE
    assert vocabulary.range_of(vocabulary.first_special) is IdRange.SPECIAL
    for name, index in (("<img>", vocabulary.image_start), ("</img>", vocabulary.image_end)):
        assert SPECIALS[index - vocabulary.first_special] == name


@given(vocabularies, st.integers(1, 100))
def test_ids_outside_are_refused(vocabulary: Vocabulary, beyond: int) -> None:
    for index in (-beyond, vocabulary.size + beyond - 1):
        with pytest.raises(ConfigError, match=f"an id must lie in 0..{vocabulary.size - 1}, got {index}"):
            vocabulary.range_of(index)


@pytest.mark.parametrize(("text_size", "num_codes"), [(0, 5), (5, 0), (-1, 5)])
def test_a_vocabulary_needs_text_and_codes(text_size: int, num_codes: int) -> None:
    with pytest.raises(ConfigError, match="a vocabulary needs text and codes"):
        Vocabulary(text_size=text_size, num_codes=num_codes)
