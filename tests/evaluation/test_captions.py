import pytest

from mars.data.scene_words import OPPOSITE, SceneObject, english_name
from mars.data.shards import Picture
from mars.evaluation.captions import (
    SPLITS,
    judge,
    judge_scenes,
    measure_captions,
    measure_scene_captions,
    names_of,
    said,
    words_of,
)
from mars.evaluation.composition import choose_tasks
from mars.pipeline import MarsPipeline


@pytest.mark.parametrize(
    ("caption", "call"),
    [
        ("Square 3, Noto style", "square 3"),
        ("方块3，Noto 风格", "方块3"),
        (" square 3. ", "square 3"),
        ("", ""),
    ],
)
def test_what_a_caption_calls_its_picture_stands_before_the_style(caption: str, call: str) -> None:
    assert said(caption) == call


def test_a_caption_is_right_if_it_is_a_name_or_a_keyword_of_its_picture(pictures: dict[str, Picture]) -> None:
    chosen = [pictures[f"a-{number}"] for number in range(4)]
    written = ["Square 0, a", "box 1 en", "square 3", ""]
    found = judge(chosen, written, language="en", seed=0)
    assert found["right"]["model"] == 0.5
    assert found["right"]["floor"] == pytest.approx(1 / 12)  # "square 3", where 3 is asked for
    assert found["exact"] == 0.25
    assert judge(chosen, written, language="zh", seed=0)["right"]["model"] == 0
    assert names_of(pictures["a-1"], language="zh") == {"方块1", "box 1 zh"}


def test_pictures_of_both_splits_are_described_in_both_languages(
    pipe: MarsPipeline, pictures: dict[str, Picture]
) -> None:
    figures, lines = measure_captions(pipe, pictures, count=3, seed=0)
    assert {title: list(languages) for title, languages in figures.items()} == {name: ["en", "zh"] for name in SPLITS}
    assert len(lines) == 12
    for line in lines:
        picture = pictures[line["key"]]
        assert picture.record.split == SPLITS[line["set"]]
        assert line["right"] == (said(line["caption"]) in names_of(picture, language=line["language"]))
    for title, languages in figures.items():
        for language, one in languages.items():
            rights = [line["right"] for line in lines if (line["set"], line["language"]) == (title, language)]
            assert one["right"]["model"] == sum(rights) / 3
    again, _ = measure_captions(pipe, pictures, count=3, seed=0)
    assert again == figures


def test_a_scene_has_all_the_names_that_its_program_has_for_it() -> None:
    pair = next(task for task in choose_tasks(count=1, seed=0, size=128)["spatial"])
    one, two = pair.scene.objects
    words = words_of(pair.scene, language="en")
    side = pair.scene.relation
    assert side is not None
    assert words == {*said_of(one, two, side), *said_of(two, one, OPPOSITE[side])}
    assert len(words) == 4
    assert pair.prompt("zh") in words_of(pair.scene, language="zh")


def said_of(first: SceneObject, second: SceneObject, side: str) -> tuple[str, str]:
    one, two = (("an " if name[0] in "aeiou" else "a ") + name for name in (english_name(first), english_name(second)))
    if side in ("left", "right"):
        return f"{one} to the {side} of {two}", f"{two} with {one} on its {side}"
    return f"{one} {side} {two}", f"{two} with {one} {side} it"


def test_scenes_are_described_in_both_languages(pipe: MarsPipeline) -> None:
    tasks = [task for some in choose_tasks(count=2, seed=0, size=128).values() for task in some]
    figures, lines = measure_scene_captions(pipe, tasks, seed=0)
    assert {title: list(languages) for title, languages in figures.items()} == {"unseen scenes": ["en", "zh"]}
    assert len(lines) == 2 * len(tasks)
    assert not any(line["right"] for line in lines)  # an untrained model
    written = [task.prompt("en") for task in tasks]
    assert judge_scenes(tasks, written, language="zh", seed=0)["right"]["model"] == 0
    found = judge_scenes(tasks, [*(f"{text}." for text in written[:-1]), "a hat"], language="en", seed=0)
    assert found["rights"] == [True] * (len(tasks) - 1) + [False]
    assert found["right"]["floor"] == 0
    assert found["exact"] == found["right"]["model"] == pytest.approx(1 - 1 / len(tasks))
