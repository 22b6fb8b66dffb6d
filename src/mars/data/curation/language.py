"""Which language a caption is in, and how long it is. Knows text only; offline.

The script decides where it can (Han, kana, Hangul, Thai, ...). Among languages of one script py3langid decides, a naive
Bayes classifier over byte n-grams. A caption is short, so what it is labelled with has the benefit of the doubt:
docs/log.md has what was measured.
"""

import functools
import re
import unicodedata
from collections import Counter
from typing import Any

from mars.errors import DataError

UNKNOWN = "und"
"""ISO 639's code for a language that was not determined."""
LIKELY, DOUBTED = 0.5, 0.05
"""A language is named when it is this likely; a label is contradicted when its own is less likely than the second."""
PRESENT = 0.25
"""Share of a caption that must be in the script of its label: names of things are often in another."""
LETTERS = 12
"""Of a caption with fewer letters only the script is asked."""
JAPANESE = 0.2
"""Share of kana among Chinese and Japanese characters from which a text is Japanese."""

_CJK = (
    r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_UNIT = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[^\W_]|(?<=\w)['’.-](?=\w)|[\u0300-\u036f\u0900-\u0dff])+")
_ONE_LANGUAGE = {
    "HAN": "zh",
    "KANA": "ja",
    "HANGUL": "ko",
    "THAI": "th",
    "GREEK": "el",
    "HEBREW": "he",
    "BENGALI": "bn",
    "TAMIL": "ta",
}
"""Scripts that settle the language."""
_LATIN = "ca cs da de en es et fi fr hr hu id it lt lv ms nl no pl pt ro sk sl sv sw tl tr vi"
_SCRIPTS = {
    **dict.fromkeys(_LATIN.split(), "LATIN"),
    **dict.fromkeys(("bg", "ru", "uk"), "CYRILLIC"),
    **dict.fromkeys(("ar", "fa", "ur"), "ARABIC"),
    "hi": "DEVANAGARI",
    **{language: script for script, language in _ONE_LANGUAGE.items()},
}
"""The languages that are told apart, and their scripts. More would only be mistaken for each other in a few words."""
_SAME = {"nb": "no", "nn": "no", "yue": "zh", "wuu": "zh"}


def units(text: str) -> list[str]:
    """What the length of a caption is counted in: Chinese and Japanese characters, and words of other scripts."""
    return _UNIT.findall(text)


def scripts_of(text: str) -> dict[str, float]:
    """Share of each script in the units that have letters, the largest first, as Unicode names it.

    `HAN` for Chinese, and for Japanese `KANA`, with its Han characters. Empty without letters.
    """
    counts = Counter(_script(unit) for unit in units(text) if any(map(str.isalpha, unit)))
    kana, han = counts.pop("KANA", 0), counts.pop("HAN", 0)
    if kana + han:
        counts["KANA" if kana >= JAPANESE * (kana + han) else "HAN"] = kana + han
    return {script: count / counts.total() for script, count in counts.most_common()}


def _script(unit: str) -> str:
    letter = next(filter(str.isalpha, unit))
    name = unicodedata.name(letter, "UNKNOWN").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split()[0]
    return {
        "CJK": "HAN",
        "IDEOGRAPHIC": "HAN",
        "HIRAGANA": "KANA",
        "KATAKANA": "KANA",
        "KATAKANA-HIRAGANA": "KANA",
    }.get(name, name)


def language_of(text: str, *, claimed: str = UNKNOWN) -> str:
    """The language of a caption, ISO 639-1: what is claimed, unless the text contradicts it; `und` when unsure.

    Raises:
        DataError: if py3langid is not installed.
    """
    shares = scripts_of(text)
    own = _SAME.get(claimed, claimed)
    expected = _SCRIPTS.get(own)
    if not shares or (claimed != UNKNOWN and expected is None):  # nothing to judge, or a language not told apart
        return claimed
    script = next(iter(shares))
    if shares.get(expected or "", 0) >= PRESENT:
        script = str(expected)
    if script in _ONE_LANGUAGE:
        return claimed if expected == script or (script, claimed) == ("HAN", "ja") else _ONE_LANGUAGE[script]
    if sum(map(str.isalpha, text)) < LETTERS and (claimed == UNKNOWN or expected == script):
        return claimed
    chances = dict(_identifier().rank(text))
    best = max(chances, key=lambda language: chances[language])
    likely = chances[best] >= LIKELY
    if expected == script and not (likely and chances[own] < DOUBTED):
        return claimed
    return best if likely and _SCRIPTS[best] == script else UNKNOWN


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError(
            "telling languages apart needs py3langid; install it with `pip install mars-t2i[data]`"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_SCRIPTS))
    return identifier
