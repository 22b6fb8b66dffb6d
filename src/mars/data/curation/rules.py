"""What is said of each picture on its own: whether a rule drops it, which captions stay, its hash and its scores.

Knows nothing of other pictures (`duplicates`) and nothing of files.
"""

import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from PIL import Image

from mars.data.curation.config import CaptionRules, CurationConfig
from mars.data.curation.duplicates import colours, perceptual_hash
from mars.data.curation.language import UNKNOWN, language_of, units
from mars.data.curation.removal import RemovalList
from mars.data.curation.scorers import Scorer, open_scorer
from mars.data.shards import Caption, Picture, Record
from mars.errors import ConfigError
from mars.picture import on_white_page

UNREADABLE, LISTED, SIDE, PIXELS, ASPECT, CAPTIONS = "unreadable", "listed", "side", "pixels", "aspect", "captions"
MISLABELLED, LANGUAGE, LENGTH, DUPLICATE = "mislabelled", "language", "length", "duplicate"
"""The rules, beside scorers, which go by their own names."""


@dataclass(frozen=True, kw_only=True)
class CaptionChange:
    """A caption that was dropped or labelled anew."""

    text: str
    rule: str
    value: str
    language: str = ""
    """The new label; empty where it was dropped."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found of one picture."""

    key: str
    source: str
    rule: str = ""
    """That drops it; empty where none does."""
    value: str = ""
    """What the rule was decided on."""
    width: int = 0
    height: int = 0
    stays: tuple[int, ...] = ()
    """Places of the captions that stay."""
    languages: tuple[str, ...] = ()
    """Of those, after correction."""
    lengths: tuple[int, ...] = ()
    changes: tuple[CaptionChange, ...] = ()
    hash: str = ""
    """16 hex digits."""
    colours: str = ""
    """96 hex digits."""
    scores: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line; `from_json` is its inverse."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The judgement of a line."""
        row = json.loads(line)
        for name in ("stays", "languages", "lengths"):
            row[name] = tuple(row[name])
        row["changes"] = tuple(CaptionChange(**change) for change in row["changes"])
        return cls(**row)


def kept_captions(record: Record, judgement: Judgement) -> tuple[Caption, ...]:
    """The captions that stay, with their language corrected."""
    named = zip(judgement.stays, judgement.languages, strict=True)
    return tuple(replace(record.captions[place], language=language) for place, language in named)


class Judge:
    """Applies every rule that looks at one picture at a time, cheap ones first; the first that drops it is named.

    Raises:
        ConfigError: if a scorer cannot be opened, or two have one name.
        DataError: if a removal list cannot be read.
    """

    def __init__(self, config: CurationConfig) -> None:
        self.config = config
        self.removal = RemovalList(config.remove, distance=config.duplicates.distance or 0)
        self.scorers: list[Scorer] = [open_scorer(each) for each in config.scorers]
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise ConfigError(f"scorers must have different names, got {', '.join(names)}")

    def judge(self, pictures: Sequence[Picture]) -> list[Judgement]:
        """One judgement for each of a batch of pictures, in order."""
        found, waiting = [], []
        for place, picture in enumerate(pictures):
            judgement, image = self._look(picture)
            found.append(judgement)
            if image is not None:
                waiting.append((place, image))
        for scorer, limits in zip(self.scorers, self.config.scorers, strict=True):
            if not waiting:
                break
            images = [image for _, image in waiting]
            captions = [kept_captions(pictures[place].record, found[place]) for place, _ in waiting]
            for (place, _), score in zip(waiting, scorer.score(images, captions), strict=True):
                if score is None or not math.isfinite(score):
                    continue
                scores = {**found[place].scores, scorer.name: score}
                dropped = not (_or(limits.least, score) <= score <= _or(limits.most, score))
                rule, value = (scorer.name, f"{score:.4g}") if dropped else ("", "")
                found[place] = replace(found[place], scores=scores, rule=rule, value=value)
            waiting = [(place, image) for place, image in waiting if not found[place].rule]
        return found

    def _look(self, picture: Picture) -> tuple[Judgement, Image.Image | None]:
        """The judgement before scores, and the RGB picture where it is to be scored."""
        record = picture.record
        found = Judgement(key=record.key, source=record.source)
        listed = self.removal.match(picture)
        if listed:
            return replace(found, rule=LISTED, value=listed), None
        image = self._opened(picture)
        if not isinstance(image, Image.Image):
            return replace(found, rule=image[0], value=image[1], width=image[2][0], height=image[2][1]), None
        found = replace(found, width=image.width, height=image.height)
        found = _judge_captions(record, found, self.config.captions)
        if found.rule:
            return found, None
        hashed = perceptual_hash(image)
        found = replace(found, hash=f"{hashed:016x}", colours=colours(image).hex())
        listed = self.removal.match_hash(hashed)
        return (replace(found, rule=LISTED, value=listed), None) if listed else (found, image)

    def _opened(self, picture: Picture) -> Image.Image | tuple[str, str, tuple[int, int]]:
        """The picture in RGB on white, or the rule that drops it, on what, and its width and height."""
        rules, size = self.config.size, (0, 0)
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(picture.content)) as image:
                size = width, height = image.size
                if min(size) < rules.least_side:
                    return SIDE, f"{width}x{height}", size
                if width * height > rules.most_pixels:
                    return PIXELS, f"{width}x{height}", size
                if max(size) > rules.most_aspect * min(size):
                    return ASPECT, f"{max(size) / min(size):.2f}", size
                image.load()
                return image.convert("RGB") if image.mode in ("RGB", "L") else on_white_page(image, size=size)
        except Image.DecompressionBombError:
            return PIXELS, "far too many", size
        except (OSError, SyntaxError, ValueError) as error:
            return UNREADABLE, str(error), size


def _or(limit: float | None, score: float) -> float:
    return score if limit is None else limit


def _judge_captions(record: Record, found: Judgement, rules: CaptionRules) -> Judgement:
    stays, languages, lengths, changes = [], [], [], []
    for place, caption in enumerate(record.captions):
        change = _change(caption, rules)
        language = change.language if change else caption.language
        if change:
            changes.append(change)
        if change is None or change.language:
            length = len(units(caption.text))
            fewest, most = rules.length.get(language, (0, length))
            if fewest <= length <= most:
                stays.append(place)
                languages.append(language)
                lengths.append(length)
            else:
                changes.append(CaptionChange(text=caption.text, rule=LENGTH, value=f"{length} in {language}"))
    rule, value = "", ""
    if len(stays) < rules.required:
        gone = [change for change in changes if not change.language]
        rule, value = (gone[0].rule, f"{gone[0].value}: {gone[0].text}") if gone else (CAPTIONS, str(len(stays)))
    return replace(
        found,
        rule=rule,
        value=value,
        stays=tuple(stays),
        languages=tuple(languages),
        lengths=tuple(lengths),
        changes=tuple(changes),
    )


def _change(caption: Caption, rules: CaptionRules) -> CaptionChange | None:
    """What becomes of a caption because of its language; None where it stays as it is."""
    language = language_of(caption.text, claimed=caption.language)
    if language == UNKNOWN:  # then what is wanted has the benefit of the doubt
        fits = (one for one in rules.languages if language_of(caption.text, claimed=one) == one)
        language = next(fits, UNKNOWN)
    if language != caption.language and caption.language != UNKNOWN:
        value = f"labelled {caption.language}, is {language}"
        if rules.mislabelled == "drop" or language not in rules.languages:
            return CaptionChange(text=caption.text, rule=MISLABELLED, value=value)
        return CaptionChange(text=caption.text, rule=MISLABELLED, value=value, language=language)
    if language not in rules.languages:
        return CaptionChange(text=caption.text, rule=LANGUAGE, value=language)
    if language != caption.language:
        return CaptionChange(text=caption.text, rule=LANGUAGE, value=f"is {language}", language=language)
    return None
