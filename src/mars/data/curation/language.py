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
LIKELY, DOUBTED = 0.5, 0.01
"""A language is named when it is this likely, and a label is contradicted when its language is less likely than that."""
LETTERS = 12
"""Of a caption with fewer letters only the script is asked."""
JAPANESE = 0.2
"""Share of kana among Chinese and Japanese characters from which a text is Japanese."""

_CJK = r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[^\W_]|(?<=\w)['’.-](?=\w)|[\u0300-\u036f\u0900-\u0dff])+")
_ONE_LANGUAGE = {"HAN": "zh", "KANA": "ja", "HANGUL": "ko", "THAI": "th", "GREEK": "el", "HEBREW": "he", "BENGALI": "bn", "TAMIL": "ta"}
"""Scripts that settle the language."""
_SCRIPTS = {
    **dict.fromkeys("bg ru uk".split(), "CYRILLIC"),
    **dict.fromkeys("ar fa ur".split(), "ARABIC"),
    "hi": "DEVANAGARI",
    **dict.fromkeys("ca cs da de en es et fi fr hr hu id it lt lv ms nl no pl pt ro sk sl sv sw tl tr vi".split(), "LATIN"),
    **{language: script for script, language in _ONE_LANGUAGE.items()},
}
"""The languages that are told apart, and their scripts. More would only be mistaken for each other in a few words."""
_SAME = {"nb": "no", "nn": "no", "yue": "zh", "wuu": "zh"}


def units(text: str) -> list[str]:
    """What the length of a caption is counted in: Chinese and Japanese characters, and words of other scripts."""
    return _UNIT.findall(text)


def script_of(text: str) -> str | None:
    """The script of most units, by its name in Unicode; `HAN` or `KANA` for Chinese and Japanese; None without letters."""
    counts = Counter(_script(unit) for unit in units(text) if any(map(str.isalpha, unit)))
    kana, han = counts.pop("KANA", 0), counts.pop("HAN", 0)
    if kana + han:
        counts["KANA" if kana >= JAPANESE * (kana + han) else "HAN"] = kana + han
    return max(counts, key=lambda script: counts[script]) if counts else None


def _script(unit: str) -> str:
    letter = next(filter(str.isalpha, unit))
    name = unicodedata.name(letter, "UNKNOWN").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ").split()[0]
    return {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"}.get(name, name)


def language_of(text: str, *, claimed: str = UNKNOWN) -> str:
    """The language of a caption, ISO 639-1: what is claimed, unless the text contradicts it; `und` when unsure.

    Raises:
        DataError: if py3langid is not installed.
    """
    script = script_of(text)
    if script is None:
        return claimed
    expected = _SCRIPTS.get(_SAME.get(claimed, claimed))
    if script in _ONE_LANGUAGE:
        return claimed if expected == script or (script, claimed) == ("HAN", "ja") else _ONE_LANGUAGE[script]
    if claimed != UNKNOWN and expected is None:
        return claimed  # a language that is not told apart
    short = sum(map(str.isalpha, text)) < LETTERS
    if short and (claimed == UNKNOWN or expected == script):
        return claimed
    chances = dict(_identifier().rank(text))
    best = max(chances, key=lambda language: chances[language])
    if expected == script and chances[_SAME.get(claimed, claimed)] >= DOUBTED:
        return claimed
    return best if chances[best] >= LIKELY and _SCRIPTS[best] == script else UNKNOWN


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError("telling languages apart needs py3langid; install it with `pip install mars-t2i[data]`") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(_SCRIPTS))
    return identifier
