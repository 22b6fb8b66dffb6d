from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from mars.config import from_dict
from mars.data.curation.config import CurationConfig
from mars.data.curation.rules import Judge, Judgement, kept_captions
from mars.data.shards import Caption, Picture
from mars.errors import ConfigError
from tests.data.conftest import art, png_that_claims

EN, ZH, RU = "a small red house on a hill", "山上有一座红色的小房子", "Маленький красный дом на холме у реки"


def judge(*pictures: Picture, **table: object) -> list[Judgement]:
    return Judge(from_dict(CurationConfig, table)).judge(pictures)


@pytest.mark.parametrize(
    ("size", "rule", "value"),
    [
        ((64, 64), "", ""),
        ((63, 90), "side", "63x90"),
        ((64, 192), "", ""),
        ((64, 193), "aspect", "3.02"),
        ((193, 64), "aspect", "3.02"),
        ((300, 201), "pixels", "300x201"),
    ],
)
def test_size_and_aspect_have_limits(
    make_picture: Callable[..., Picture], size: tuple[int, int], rule: str, value: str
) -> None:
    [found] = judge(make_picture(size=size), size={"most_pixels": 60_000})
    assert (found.rule, found.value) == (rule, value)
    assert (found.width, found.height) == size


def test_a_picture_that_cannot_be_read_is_dropped_before_its_pixels_are_made(
    make_picture: Callable[..., Picture],
) -> None:
    good = make_picture()
    bad = [good.content[:-200], b"", b"text" * 100, png_that_claims(60_000, 60_000), png_that_claims(9_000, 9_000)]
    found = judge(*(Picture(record=good.record, content=content) for content in bad))
    assert [one.rule for one in found] == ["unreadable", "unreadable", "unreadable", "pixels", "pixels"]


def test_transparent_pictures_are_seen_on_white(make_picture: Callable[..., Picture]) -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 32, 64))
    white = Image.new("RGB", (64, 64), "white")
    white.paste((255, 0, 0), (0, 0, 32, 64))
    one, other = judge(make_picture(image=clear), make_picture(image=white))
    assert (one.hash, one.colours) == (other.hash, other.colours)


def captions_of(picture: Picture, **rules: object) -> tuple[list[tuple[str, str]], Judgement]:
    [found] = judge(picture, captions=rules)
    return [(one.text, one.language) for one in kept_captions(picture.record, found)], found


def test_right_captions_stay_as_they_are(make_picture: Callable[..., Picture]) -> None:
    captions = [(EN, "en"), (ZH, "zh")]
    kept, found = captions_of(make_picture(captions=captions))
    assert kept == captions
    assert found.lengths == (7, 11)
    assert found.changes == ()


def test_mislabelled_captions_are_dropped(make_picture: Callable[..., Picture]) -> None:
    kept, found = captions_of(make_picture(captions=[(ZH, "en"), (EN, "en"), (RU, "zh")]))
    assert kept == [(EN, "en")]
    assert [change.rule for change in found.changes] == ["mislabelled"] * 2
    assert found.changes[0].value == "labelled en, is zh"
    assert found.rule == ""


def test_or_corrected_where_their_language_is_wanted(make_picture: Callable[..., Picture]) -> None:
    picture = make_picture(captions=[(ZH, "en"), (EN, "zh"), (RU, "zh")])
    kept, found = captions_of(picture, mislabelled="correct")
    assert kept == [(ZH, "zh"), (EN, "en")]
    assert [change.language for change in found.changes] == ["zh", "en", ""]


def test_captions_without_a_label_get_one(make_picture: Callable[..., Picture]) -> None:
    kept, _ = captions_of(make_picture(captions=[(EN, "und"), (ZH, "und"), ("red heart", "und"), (RU, "und")]))
    assert kept == [(EN, "en"), (ZH, "zh"), ("red heart", "en")]


def test_only_wanted_languages_stay(make_picture: Callable[..., Picture]) -> None:
    kept, found = captions_of(make_picture(captions=[(EN, "en"), (ZH, "zh")]), languages=["zh"])
    assert kept == [(ZH, "zh")]
    assert [change.rule for change in found.changes] == ["language"]


def test_captions_have_a_length(make_picture: Callable[..., Picture]) -> None:
    texts = [(EN, "en"), ("A house", "en"), (ZH, "zh"), ("房子", "zh")]
    kept, found = captions_of(make_picture(captions=texts), length={"en": [3, 7], "zh": [1, 10]})
    assert kept == [(EN, "en"), ("房子", "zh")]
    assert [change.value for change in found.changes] == ["2 in en", "11 in zh"]


@pytest.mark.parametrize(
    ("captions", "required", "rule"),
    [
        ([], 1, "captions"),
        ([], 0, ""),
        ([(ZH, "en")], 1, "mislabelled"),
        ([(ZH, "en"), (ZH, "zh")], 2, "mislabelled"),
        ([(EN, "en")], 2, "captions"),
        ([("...", "en")], 1, "length"),
        ([(RU, "ru")], 1, "language"),
    ],
)
def test_a_picture_needs_captions(
    make_picture: Callable[..., Picture], captions: list[tuple[str, str]], required: int, rule: str
) -> None:
    _, found = captions_of(make_picture(captions=captions), required=required)
    assert found.rule == rule


class Width:
    """Scores narrow pictures only; of the widest it says that they are no number."""

    name, digest = "width", ""

    def __init__(self, *, name: str = "width") -> None:
        self.name, self.digest = name, ""

    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:
        assert [len(several) for several in captions] == [1] * len(images)
        unknown = {200: None, 300: float("nan")}
        return [unknown.get(image.width, float(image.width)) for image in images]


def test_scores_are_kept_and_have_limits(make_picture: Callable[..., Picture]) -> None:
    sizes = [(70, 70), (80, 80), (90, 90), (100, 100), (200, 200), (300, 300), (20, 20)]
    pictures = [make_picture(size=size) for size in sizes]
    found = judge(*pictures, scorers=[{"scorer": f"{__name__}:Width", "least": 80, "most": 90}])
    assert [one.rule for one in found] == ["width", "", "", "width", "", "", "side"]
    assert [one.scores for one in found] == [{"width": 70}, {"width": 80}, {"width": 90}, {"width": 100}, {}, {}, {}]
    assert found[0].value == "70"


def test_what_one_scorer_drops_the_next_does_not_see(make_picture: Callable[..., Picture]) -> None:
    scorers = [
        {"scorer": f"{__name__}:Width", "least": 80},
        {"scorer": f"{__name__}:Width", "options": {"name": "second"}},
    ]
    found = judge(make_picture(size=(70, 70)), make_picture(size=(80, 80)), scorers=scorers)
    assert [one.scores for one in found] == [{"width": 70}, {"width": 80, "second": 80}]


def test_two_scorers_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="different names, got width, width"):
        judge(scorers=[{"scorer": f"{__name__}:Width"}] * 2)


def test_listed_pictures_go_by_name_and_by_look(make_picture: Callable[..., Picture], tmp_path: object) -> None:
    from pathlib import Path

    from mars.data.curation.duplicates import perceptual_hash

    path = Path(str(tmp_path)) / "gone.txt"
    path.write_text(f"named\n{perceptual_hash(art(5)):016x}\n")
    small = art(5).resize((70, 70), Image.Resampling.LANCZOS)
    pictures = [make_picture("named", number=1), make_picture("seen", image=small), make_picture("other", number=2)]
    found = judge(*pictures, remove=[str(path)])
    assert [one.rule for one in found] == ["listed", "listed", ""]


def test_a_judgement_survives_as_a_line(make_picture: Callable[..., Picture]) -> None:
    picture = make_picture(captions=[(ZH, "en"), (EN, "en")])
    [found] = judge(picture, scorers=[{"scorer": f"{__name__}:Width"}])
    assert "\n" not in found.to_json()
    assert Judgement.from_json(found.to_json()) == found
