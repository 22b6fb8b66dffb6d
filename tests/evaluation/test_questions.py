from dataclasses import replace

from mars.data.shards import Picture
from mars.evaluation.questions import SETS, choose_questions


def test_questions_are_of_their_split_with_prompts_in_both_languages(pictures: dict[str, Picture]) -> None:
    for chosen in SETS.values():
        for question in choose_questions(pictures, chosen=chosen, count=5, seed=0):
            record = pictures[question.key].record
            assert record.split == chosen.split
            texts = {caption.language: caption.text for caption in record.captions if caption.kind == chosen.kind}
            assert question.prompts == texts


def test_candidates_are_other_concepts_of_the_same_style_and_the_true_one_is_first(
    pictures: dict[str, Picture],
) -> None:
    for question in choose_questions(pictures, chosen=SETS["trained names"], count=30, seed=0):
        records = [pictures[key].record for key in question.candidates]
        assert question.candidates[0] == question.key
        assert {record.style for record in records} == {records[0].style}
        assert len({record.concept for record in records}) == len(records) == 25


def test_the_seed_fixes_the_questions(pictures: dict[str, Picture]) -> None:
    def chosen(seed: int) -> object:
        return choose_questions(pictures, chosen=SETS["trained names"], count=10, seed=seed)

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_what_looks_or_is_called_the_same_is_no_candidate(pictures: dict[str, Picture]) -> None:
    namesake = pictures["a-2"].record.captions
    pictures["a-1"] = replace(pictures["a-1"], png=pictures["a-0"].png)
    pictures["a-3"] = replace(pictures["a-3"], record=replace(pictures["a-3"].record, captions=namesake))
    questions = choose_questions(pictures, chosen=SETS["trained names"], count=100, seed=0)
    candidates = {question.key: set(question.candidates) for question in questions}
    assert "a-1" not in candidates["a-0"]
    assert "a-3" not in candidates["a-2"]
    assert {"a-0", "a-1"} <= candidates["a-5"]
