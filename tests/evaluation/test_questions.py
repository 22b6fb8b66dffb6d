import io
from dataclasses import replace

from PIL import Image

from mars.data.shards import Picture
from mars.evaluation.questions import SETS, Seen, choose_questions


def test_questions_are_of_their_split_with_prompts_in_both_languages(pictures: dict[str, Picture]) -> None:
    for chosen in SETS.values():
        for question in choose_questions(pictures, chosen=chosen, count=5, seed=0):
            record = pictures[question.key].record
            assert record.split == chosen.split
            texts = {caption.language: caption.text for caption in record.captions if caption.kind == chosen.kind}
            if chosen.wording is None:
                assert question.prompts == texts
            else:
                assert question.prompts == {lang: chosen.wording[lang].format(text) for lang, text in texts.items()}


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
    pictures["a-1"] = replace(pictures["a-1"], content=pictures["a-0"].content)
    pictures["a-3"] = replace(pictures["a-3"], record=replace(pictures["a-3"].record, captions=namesake))
    questions = choose_questions(pictures, chosen=SETS["trained names"], count=100, seed=0)
    candidates = {question.key: set(question.candidates) for question in questions}
    assert "a-1" not in candidates["a-0"]
    assert "a-3" not in candidates["a-2"]
    assert {"a-0", "a-1"} <= candidates["a-5"]


def test_a_held_out_picture_that_looks_like_a_trained_one_is_never_asked_about(pictures: dict[str, Picture]) -> None:
    file = io.BytesIO()
    with Image.open(io.BytesIO(pictures["b-0"].content)) as trained:
        trained.convert("RGBA").save(file, "PNG", compress_level=0)
    assert file.getvalue() != pictures["b-0"].content
    pictures["a-3"] = replace(pictures["a-3"], content=file.getvalue())  # held out as a picture
    pictures["a-4"] = replace(pictures["a-4"], content=pictures["a-1"].content)  # held out as a concept
    pictures["a-2"] = replace(pictures["a-2"], content=pictures["a-1"].content)  # trained, as its twin is
    pictures["a-9"] = replace(pictures["a-9"], content=pictures["a-14"].content)  # both held out
    seen = Seen.of(pictures.values())
    leaks = {name: seen.leaks(pictures, chosen=chosen) for name, chosen in SETS.items()}
    looks_trained = {
        key for key, one in pictures.items()
        if any((one.pixels() == other.pixels()).all() for other in pictures.values() if other.record.split == "train")
    }  # fmt: skip
    assert {"a-3", "a-4"} <= looks_trained
    for name, split in (("held-out pictures", "picture"), ("held-out concepts", "concept")):
        assert leaks[name] == {key for key in looks_trained if pictures[key].record.split == split}
        asked = choose_questions(pictures, chosen=SETS[name], count=100, seed=0, without=leaks[name])
        assert {one.key for one in asked} == {k for k, one in pictures.items() if one.record.split == split} - leaks[
            name
        ]
    assert leaks["trained names"] == leaks["paraphrases"] == frozenset()


def test_a_paraphrase_that_is_a_trained_caption_is_never_asked_about(pictures: dict[str, Picture]) -> None:
    def renamed(key: str, kind: str, text: str) -> None:
        record = pictures[key].record
        captions = tuple(replace(one, text=text) if one.kind == kind else one for one in record.captions)
        pictures[key] = replace(pictures[key], record=replace(record, captions=captions))

    renamed("a-5", "name", "box 0 en")  # trained under another concept's paraphrase
    renamed("a-3", "name", "box 1 zh")  # held out, so never read
    renamed("a-7", "paraphrase", "box 2 en")  # only another paraphrase
    leaks = Seen.of(pictures.values()).leaks(pictures, chosen=SETS["paraphrases"])
    assert leaks == {"a-0", "b-0"}
    asked = choose_questions(pictures, chosen=SETS["paraphrases"], count=100, seed=0, without=leaks)
    assert {"a-1", "a-2", "a-7"} <= {one.key for one in asked}
    assert not leaks & {one.key for one in asked}
