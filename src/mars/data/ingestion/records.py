"""An item of a source to a picture of a shard, or the reason why not. This is what worker processes run."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mars.data.ingestion.decoding import MAX_BYTES, stored_form
from mars.data.ingestion.items import Item
from mars.data.shards import KINDS, Caption, Picture, Record
from mars.errors import DataError, MarsError, RequestError

MAX_TEXT_BYTES = 1 << 24
"""Of a text beside a picture."""
_CAPTIONS = ("caption", "captions", "text", "txt")
_ROLES: dict[str, tuple[str, ...]] = {
    "image": (),
    "url": ("url", "URL"),
    "licence": ("licence", "license"),
    "source": ("source",),
    "concept": ("concept",),
    "style": ("style",),
    "split": ("split",),
}
"""What a column can be, and the names that it then has where no other is given; tables.py knows those of pictures."""


@dataclass(frozen=True, kw_only=True)
class CaptionColumn:
    """A column of captions, in a table, in the JSON beside a picture, or that text itself (`txt`)."""

    column: str
    language: str = "und"
    """ISO 639-1; `und` leaves it to curation."""
    kind: str = "original"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `COLUMN`, `COLUMN:LANGUAGE` or `COLUMN:LANGUAGE:KIND`.

        Raises:
            RequestError: if it is none of these.
        """
        column, _, rest = text.partition(":")
        language, _, kind = rest.partition(":")
        language, kind = language or "und", kind or "original"
        if not column or kind not in KINDS or not re.fullmatch("[a-z]{2}|und", language):
            raise RequestError(
                f"--caption must be COLUMN[:LANGUAGE[:KIND]], language of two letters, kind one of {', '.join(KINDS)}; "
                f"got {text!r}"
            )
        return cls(column=column, language=language, kind=kind)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is read from where; columns are also the keys of JSON beside a picture."""

    captions: tuple[CaptionColumn, ...] = ()
    """None takes `caption`, `captions`, `text` and `txt`. What MARS itself wrote is taken in any case."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Names of columns by what they are: image, url, licence, source, concept, style or split."""
    scores: tuple[str, ...] = ()
    """Columns of numbers."""
    source: str | None = None
    """Of pictures that say none; None takes the name of the folder or file."""
    licence: str = "unknown"
    """Of pictures that say none."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.roles) - set(_ROLES)):
            raise RequestError(f"--column must be ROLE=NAME with a role of {', '.join(_ROLES)}, got {unknown[0]}")

    @property
    def required(self) -> set[str]:
        """Columns that every table must have."""
        return {*self.roles.values(), *self.scores}

    @property
    def caption_names(self) -> tuple[str, ...]:
        """Columns of captions that were named; a source has one of them at least."""
        return tuple(dict.fromkeys(one.column for one in self.captions))

    @property
    def wanted(self) -> set[str]:
        """All columns that are looked at, but for those of pictures."""
        return {*self.required, *self.caption_names, *_CAPTIONS, "scores"}.union(*_ROLES.values())


def picture_of(item: Item, *, source: str, columns: Columns) -> Picture | str:
    """The picture of an item of the source of this name, or why it is refused."""
    if item.problem is not None:
        return item.problem
    try:
        values = {**item.fields, **_beside(item)}
        captions = _captions(values, columns=columns)
        scores = _scores(values, columns=columns)
        texts = {role: _of_role(values, role=role, columns=columns) for role in _ROLES if role != "image"}
        stored = stored_form(_read(item.picture, most=MAX_BYTES))
    except MarsError as error:
        return str(error)
    key = key_of(item.name, source=source)
    record = Record(
        key=key,
        concept=texts["concept"] or key,
        style=texts["style"] or "",
        split=texts["split"] or "train",
        source=texts["source"] or columns.source or source,
        licence=texts["licence"] or columns.licence,
        captions=captions,
        width=stored.width,
        height=stored.height,
        scores=scores,
        url=texts["url"],
    )
    return Picture(record=record, content=stored.content, suffix=stored.suffix)


def key_of(name: str, *, source: str) -> str:
    """A key that says where a picture is from, and is another one for every other name.

    It stays the same when other pictures are added to the source.
    """
    whole = os.fsencode(f"{source}/{name}")
    readable = re.sub("[^A-Za-z0-9]+", "-", f"{source}/{name}")[-40:].strip("-")
    return f"{readable}-{hashlib.blake2b(whole, digest_size=8).hexdigest()}"


def _read(content: bytes | Path | None, *, most: int) -> bytes:
    assert content is not None
    if isinstance(content, bytes):
        return content
    try:
        if not content.is_file():  # whatever else it is, reading it may never end
            raise DataError("missing file")
        if (size := content.stat().st_size) > most:
            raise DataError(f"too many bytes ({size:,}, at most {most:,})")
        return content.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"unreadable file ({getattr(error, 'strerror', None) or 'its name cannot be one'})") from None


def _beside(item: Item) -> dict[str, Any]:
    """What the texts beside a picture say: keys of JSON objects, other texts by their suffix."""
    values: dict[str, Any] = {}
    for suffix, content in item.texts.items():
        try:
            text = _read(content, most=MAX_TEXT_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"text that is not UTF-8 (.{suffix})") from None
        if not suffix.endswith("json"):
            values[suffix] = text
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"text that is not JSON (.{suffix})") from None
        if not isinstance(found, dict):
            raise DataError(f"text that is not a JSON object (.{suffix})")
        values.update(found)
    return values


def _captions(values: Mapping[str, Any], *, columns: Columns) -> tuple[Caption, ...]:
    """Those of the columns that are named, or of all that may be captions; those of shards that MARS wrote always."""
    captions: dict[tuple[str, str], Caption] = {}
    own = CaptionColumn(column="captions")
    named = columns.captions or tuple(CaptionColumn(column=name) for name in _CAPTIONS)
    for one in named if own in named else (*named, own):
        found = values.get(one.column)
        for text in found if isinstance(found, list) else [found]:
            if one is own and not _is_own(text):
                continue
            caption = _caption(text, one=one)
            if caption.text:
                captions.setdefault((caption.text, caption.language), caption)
    return tuple(captions.values())


def _is_own(found: Any) -> bool:
    """Whether it is a caption as shards hold it that MARS wrote."""
    return isinstance(found, dict) and found.keys() == {"text", "language", "kind"}


def _caption(found: Any, *, one: CaptionColumn) -> Caption:
    if _is_own(found):
        language, kind = (_text(found[name], column=one.column) for name in ("language", "kind"))
        return Caption(text=_text(found["text"], column=one.column), language=language, kind=kind)
    return Caption(text=_text(found, column=one.column), language=one.language, kind=one.kind)


def _text(value: Any, *, column: str) -> str:
    """The text of a value; empty for none."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise DataError(f"no text in column {column}, but {type(value).__name__}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"text that is not UTF-8 (column {column})") from None
    return text


def _of_role(values: Mapping[str, Any], *, role: str, columns: Columns) -> str | None:
    named = columns.roles.get(role)
    for name in (named,) if named else _ROLES[role]:
        if text := _text(values.get(name), column=name):
            return text
    return None


def _scores(values: Mapping[str, Any], *, columns: Columns) -> dict[str, float]:
    own = values.get("scores")
    found = {**own} if isinstance(own, dict) else {}
    found |= {name: values.get(name) for name in columns.scores}
    scores = {}
    for name, value in found.items():
        if value is None or value == "":
            continue
        try:
            scores[name] = float(value)
        except (TypeError, ValueError):
            raise DataError(f"score {name} that is no number ({str(value)[:40]!r})") from None
        if not math.isfinite(scores[name]):
            raise DataError(f"score {name} that is not finite")
    return scores
