import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mars.data.ingestion.items import Item
from mars.data.ingestion.records import CaptionColumn, Columns, key_of, picture_of
from mars.data.shards import Caption, Picture, Record
from mars.errors import RequestError


@pytest.fixture
def record(picture_file: Callable[..., bytes]) -> Callable[..., Record]:
    """The record of a sound picture with these fields and texts."""

    def make(columns: Columns | None = None, texts: Any = None, **fields: Any) -> Record:
        item = Item(name="a/b.png", picture=picture_file(1), texts=texts or {}, fields=fields)
        found = picture_of(item, source="photos", columns=columns or Columns())
        assert isinstance(found, Picture), found
        return found.record

    return make


@pytest.fixture
def refusal(picture_file: Callable[..., bytes]) -> Callable[..., str]:
    """Why a picture is refused."""

    def make(columns: Columns | None = None, picture: Any = None, texts: Any = None, **fields: Any) -> str:
        item = Item(name="a/b.png", picture=picture or picture_file(1), texts=texts or {}, fields=fields)
        found = picture_of(item, source="photos", columns=columns or Columns())
        assert isinstance(found, str)
        return found

    return make


def original(text: str) -> Caption:
    return Caption(text=text, language="und", kind="original")


def test_a_picture_of_which_nothing_is_known_has_a_record(record: Callable[..., Record]) -> None:
    key = key_of("a/b.png", source="photos")
    assert record() == Record(
        key=key, concept=key, style="", split="train", source="photos", licence="unknown", captions=(), width=64,
        height=64, scores={}, url=None,
    )  # fmt: skip


def test_texts_beside_a_picture_are_its_captions_each_once(record: Callable[..., Record]) -> None:
    side = {"json": b'\xef\xbb\xbf{"caption": "a cat", "url": "u", "licence": "CC0"}', "txt": " a cat\n", "caption": ""}
    texts = {name: text.encode() if isinstance(text, str) else text for name, text in side.items()}
    texts["txt"] = "另一只猫\n".encode()
    found = record(texts=texts)
    assert found.captions == (original("另一只猫"),)  # the file KEY.caption stands for the key caption of KEY.json
    del texts["caption"]
    found = record(texts=texts)
    assert found.captions == (original("a cat"), original("另一只猫"))
    assert (found.url, found.licence) == ("u", "CC0")
    texts["txt"] = b" a cat\n"
    assert record(texts=texts).captions == (original("a cat"),)


def test_captions_have_the_language_and_kind_that_were_told(record: Callable[..., Record]) -> None:
    told = Columns(captions=tuple(map(CaptionColumn.parse, ["en:en", "zh:zh:translated", "long::dense"])))
    found = record(told, en=["a cat", "a tom", None], zh="猫", long=7, text="not asked for")
    assert found.captions == (
        Caption(text="a cat", language="en", kind="original"),
        Caption(text="a tom", language="en", kind="original"),
        Caption(text="猫", language="zh", kind="translated"),
        Caption(text="7", language="und", kind="dense"),
    )


@pytest.mark.parametrize("text", ["", ":en", "a:english", "a:en:poem", "a:EN"])
def test_a_caption_column_that_means_nothing_is_one_line(text: str) -> None:
    with pytest.raises(RequestError, match=r"--caption must be COLUMN\[:LANGUAGE\[:KIND\]\]"):
        CaptionColumn.parse(text)


def test_what_mars_wrote_comes_back(record: Callable[..., Record]) -> None:
    captions = [{"text": "a cat", "language": "en", "kind": "name"}, {"text": "猫", "language": "zh", "kind": "dense"}]
    values = {"captions": captions, "concept": "cat", "style": "flat", "split": "held", "source": "s", "licence": "MIT",
              "url": "u", "scores": {"beauty": 0.5}}  # fmt: skip
    for found in (record(**values), record(texts={"json": json.dumps(values).encode()})):
        assert found.captions == tuple(Caption(**caption) for caption in captions)
        assert (found.concept, found.style, found.split) == ("cat", "flat", "held")
        assert (found.source, found.licence, found.url, found.scores) == ("s", "MIT", "u", {"beauty": 0.5})


def test_columns_of_any_name_can_be_what_they_are(record: Callable[..., Record]) -> None:
    told = Columns(
        roles={"licence": "rights", "url": "link", "split": "part"},
        scores=("beauty", "none"),
        source="me",
        licence="MIT",
    )
    found = record(told, rights="CC0", link="u", part="test", beauty="0.25", none="", licence="not asked for")
    assert (found.licence, found.url, found.split, found.source) == ("CC0", "u", "test", "me")
    assert found.scores == {"beauty": 0.25}
    assert record(told, link=None).licence == "MIT"


def test_a_role_that_is_none_is_one_line() -> None:
    with pytest.raises(RequestError, match="--column must be ROLE=NAME with a role of image, url, .* got colour"):
        Columns(roles={"colour": "c"})


def test_a_key_is_readable_unique_and_fit_for_a_tar() -> None:
    names = ["a/b.png", "a/b.PNG", "a-b.png", "猫.png", "caf\udce9.png", "x" * 300 + ".png", "l.jsonl#1", "l.jsonl#2"]
    keys = {key_of(name, source=source) for name in names for source in ("photos", "photos/a")}
    assert len(keys) == 2 * len(names)
    for key in keys:
        assert key.isascii()
        assert key.replace("-", "").isalnum()
        assert len(key) < 60
    assert key_of("a/b.png", source="photos").startswith("photos-a-b-png-")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"txt": "naïve".encode("latin-1")}, "text that is not UTF-8 (.txt)"),
        ({"txt": "a cat".encode("utf-16")}, "text that is not UTF-8 (.txt)"),
        ({"json": b'{"text": '}, "text that is not JSON (.json)"),
        ({"json": b'["text"]'}, "text that is not a JSON object (.json)"),
        ({"json": b"[" * 100_000}, "text that is not JSON (.json)"),
        ({"json": b'{"text": "\\ud800"}'}, "text that is not UTF-8 (column text)"),
        ({"json": b'{"text": {"a": 1}}'}, "no text in column text, but dict"),
        ({"json": b'{"scores": {"beauty": "high"}}'}, "score beauty that is no number ('high')"),
        ({"json": b'{"scores": {"beauty": NaN}}'}, "score beauty that is not finite"),
        ({"json": b'{"url": "\\ud800"}'}, "text that is not UTF-8 (column url)"),
    ],
)
def test_texts_that_cannot_be_used_are_told(refusal: Callable[..., str], texts: dict[str, bytes], reason: str) -> None:
    assert refusal(texts=texts) == reason


def test_text_of_a_table_in_another_encoding_is_told(refusal: Callable[..., str]) -> None:
    assert refusal(text=b"na\xefve".decode("utf-8", "surrogateescape")) == "text that is not UTF-8 (column text)"


def test_files_that_cannot_be_read_are_told(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert refusal(picture=tmp_path / "absent.png") == "missing file"
    assert refusal(picture=tmp_path) == "missing file"
    assert refusal(picture=tmp_path / ("x" * 300)) in ("missing file", "unreadable file (File name too long)")
    assert refusal(picture=tmp_path / "a\0b") in ("missing file", "unreadable file (its name cannot be one)")


def test_captions_of_shards_that_mars_wrote_come_along_whatever_columns_are_named(
    record: Callable[..., Record],
) -> None:
    own = [{"text": "红苹果", "language": "zh", "kind": "name"}]
    named = Columns(captions=(CaptionColumn(column="alt", language="en"),))
    assert record(named, captions=own, alt="a red apple").captions == (
        Caption(text="a red apple", language="en", kind="original"),
        Caption(text="红苹果", language="zh", kind="name"),
    )
    assert (
        record(named, captions=["not named"], alt="a red apple").captions == record(named, alt="a red apple").captions
    )
