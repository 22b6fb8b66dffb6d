import re
import string
from pathlib import Path

import pytest

from mars.server.page import words
from mars.server.page.words import EXAMPLES, LANGUAGES, WORDS, Words, preferred

CHINESE = re.compile("[\u4e00-\u9fff]")
SAME = {"top_p"}
"""What is said alike."""
SWITCH = {"other_language", "other_language_hint"}
"""In the other language."""
PAGE = Path(words.__file__).parent


def places(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_has_a_twin_with_the_same_places() -> None:
    for name, (english, chinese) in WORDS.items():
        if name in SWITCH:
            english, chinese = chinese, english
        assert places(english) == places(chinese), name
        assert english.strip(), name
        assert chinese.strip(), name
        if name not in SAME:
            assert CHINESE.search(chinese), name
            assert not CHINESE.search(english), name
    assert {name for name, (english, chinese) in WORDS.items() if english == chinese} == SAME
    assert EXAMPLES.keys() == set(LANGUAGES)
    assert all(CHINESE.search(text) for text in EXAMPLES["zh"])


def test_texts_that_are_asked_for_are_there_and_all_are() -> None:
    sources = [path.read_text("utf-8") for path in PAGE.rglob("*.*") if path.suffix in (".py", ".js", ".html")]
    asked = set(re.findall(r'say\("(\w+)"', "".join(sources)))
    assert asked
    assert asked <= WORDS.keys()
    everything = "".join(text for text in sources if "WORDS: Mapping" not in text)
    prefixes = ("do_", "how_", "side_")  # with a name put behind
    plain = [name for name in WORDS if not name.startswith(prefixes)]
    assert [name for name in plain if not re.search(rf"\b{name}\b", everything)] == []


def test_no_text_of_a_person_is_outside_the_table() -> None:
    for path in PAGE.rglob("*"):
        if path.suffix in (".py", ".js", ".html", ".css") and path.name != "words.py":
            assert not CHINESE.search(path.read_text("utf-8")), path


def test_values_stand_in_their_places() -> None:
    assert Words("en")("drawing", seconds=3) == "Drawing… 3 s"
    assert Words("zh")("drawing", seconds=3) == "绘制中…… 3 秒"
    assert Words("en").other == "zh"


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"), (",;,", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de, fr;q=0.5", "en"),
        ("de,zh-Hant-TW;q=.8,en;q=.5", "zh"),
    ],
)  # fmt: skip
def test_the_first_language_of_ours_that_a_browser_names_is_taken(header: str, language: str) -> None:
    assert preferred(header) == language
