import pytest

from mars.data.shards import Picture
from mars.evaluation.captions import SPLITS, judge, measure_captions, names_of, said
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
