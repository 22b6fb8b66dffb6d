import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars.data.curation.language import UNKNOWN, language_of, scripts_of, units
from mars.data.scene_words import captions_of
from mars.data.scenes import make_scene


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("a red apple, and 3 pears!", 6),
        ("一只红色的苹果。", 7),
        ("iPhone 手机壳", 4),
        ("don't state-of-the-art café", 3),
        ("日本の城", 4),
        ("빨간 사과", 2),
        ("", 0),
        ("，。！ — *", 0),
    ],
)
def test_length_counts_words_and_chinese_characters(text: str, length: int) -> None:
    assert len(units(text)) == length


@given(st.text())
def test_every_text_has_a_length_and_a_language(text: str) -> None:
    assert sum(scripts_of(text).values()) == pytest.approx(1 if scripts_of(text) else 0)
    assert len(units(text)) <= len(text)
    for claimed in ("en", UNKNOWN):
        assert 2 <= len(language_of(text, claimed=claimed)) <= 3


def test_right_captions_keep_their_label() -> None:
    captions = [one for number in range(300) for one in captions_of(make_scene(number, seed=3))]
    assert {one.language for one in captions} == {"en", "zh"}
    assert [one for one in captions if language_of(one.text, claimed=one.language) != one.language] == []


def test_labels_of_another_script_are_always_found() -> None:
    captions = [one for number in range(100) for one in captions_of(make_scene(number, seed=3))]
    swapped = {"en": "zh", "zh": "en"}
    found = {(one.language, language_of(one.text, claimed=swapped[one.language])) for one in captions}
    assert found <= {("en", "en"), ("zh", "zh"), ("en", UNKNOWN)}


SENTENCES = {
    "de": "Eine schwarze Katze sitzt auf dem Küchentisch und schaut aus dem Fenster",
    "fr": "Un chat noir est assis sur la table de la cuisine et regarde par la fenêtre",
    "es": "Un gato negro está sentado en la mesa de la cocina y mira por la ventana",
    "it": "Un gatto nero è seduto sul tavolo della cucina e guarda fuori dalla finestra",
    "vi": "Một con mèo đen ngồi trên bàn bếp và nhìn ra ngoài cửa sổ",
    "ru": "Чёрная кошка сидит на кухонном столе и смотрит в окно",
    "ja": "黒い猫がキッチンテーブルに座って窓の外を見ています",
    "ko": "검은 고양이가 식탁에 앉아 창밖을 보고 있다",
    "th": "แมวดำนั่งอยู่บนโต๊ะในครัว",
    "en": "A black cat sits on the kitchen table and looks out of the window",
    "zh": "一只黑猫坐在厨房的桌子上，望着窗外",
}


@pytest.mark.parametrize(("language", "text"), SENTENCES.items())
def test_a_sentence_is_recognised_whatever_it_is_labelled(language: str, text: str) -> None:
    for claimed in (UNKNOWN, language, "en", "zh"):
        assert language_of(text, claimed=claimed) == language


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ninja, Noto style", "en"),  # words of no language
        ("a sign saying 出口", "en"),
        ("OK，Noto 风格", "zh"),
        ("T恤", "zh"),
        ("日本城堡", "ja"),  # kanji alone
        ("croissant", "en"),
        ("3 + 4", "zh"),
        ("Saluton, bela mondo", "eo"),  # not told apart
    ],
)
def test_a_label_has_the_benefit_of_the_doubt(text: str, label: str) -> None:
    assert language_of(text, claimed=label) == label


def test_a_few_words_without_a_label_stay_unknown() -> None:
    assert language_of("red heart") == UNKNOWN
