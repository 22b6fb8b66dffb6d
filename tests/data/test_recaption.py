import asyncio
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mars.data import recaption as recaption_module
from mars.data.recaption import GIVE_UP, MOST_UNITS, AnswerCache, NoAnswer, UnusableAnswer, fault_of, recaption
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, Record, read_pictures
from mars.errors import DataError
from tests.data.conftest import art, encoded

EN, ZH = (
    "A small red house stands on a green hill under a blue sky.",
    "一座红色的小房子坐落在绿色的山坡上，天空是蓝色的。",
)
TEXTS = {"en": EN, "zh": ZH}
PICTURES = 10


class Writer:
    """A captioner that says what a function says of a key, a language and an attempt, and counts questions."""

    prompts: ClassVar = {"en": "Describe.", "zh": "描述。"}
    answers, at_once = 3, 2

    def __init__(self, says: Callable[[str, str, int], str] | None = None, *, name: str = "writer") -> None:
        self.name, self._says = name, says or (lambda key, language, attempt: TEXTS[language])
        self.asked: Counter[tuple[str, str]] = Counter()
        self.closed = 0

    async def caption(self, picture: Picture, *, language: str, attempt: int) -> str:
        key = picture.record.key
        assert self.asked[key, language] == attempt
        self.asked[key, language] += 1
        await asyncio.sleep(0.001 * (hash(key) % 3))  # answers come in any order
        return self._says(key, language, attempt)

    async def close(self) -> None:
        self.closed += 1


def write_set(folder: Path, *, captions: Iterable[Caption] = (), count: int = PICTURES) -> Path:
    with ShardFolder(folder, settings={"source": "test"}, max_pictures=4) as shards:
        for number in range(count):
            record = Record(
                key=f"p{number}", concept="", style="", split="train", source="test", licence="CC0-1.0",
                captions=(Caption(text="house", language="en", kind="original"), *captions),
            )  # fmt: skip
            shards.add(Picture(record=record, content=encoded(art(number, size=(16, 16)))), consumed=number)
        shards.finish()
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_set(tmp_path / "in")


def run(source: Path, out: str, captioner: Writer, *, languages: Iterable[str] = ("en", "zh"), cache: str = "c") -> Any:
    folder = source.parent
    done = recaption(source, out=folder / out, captioner=captioner, languages=list(languages), cache=folder / cache)
    assert captioner.closed <= 1
    return done


def quarantine(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_picture_gains_a_dense_caption_per_language(source: Path, tmp_path: Path) -> None:
    done = run(source, "out", Writer())
    assert (done.pictures, done.asked, done.remembered, done.failed) == (PICTURES, 2 * PICTURES, 0, 0)
    for old, new in zip(read_pictures(source), read_pictures(tmp_path / "out"), strict=True):
        assert (new.record.key, new.content) == (old.record.key, old.content)
        added = [Caption(text=TEXTS[language], language=language, kind="dense") for language in ("en", "zh")]
        assert new.record.captions == (*old.record.captions, *added)


@pytest.mark.parametrize(
    ("text", "language", "fault"),
    [
        (EN, "en", None),
        (ZH, "zh", None),
        ("", "en", "empty"),
        (EN, "zh", "wrong language"),
        (ZH, "en", "wrong language"),
        ("I'm sorry, but I can't describe this picture.", "en", "refusal"),
        ("I cannot assist with this request.", "en", "refusal"),
        ("抱歉，我无法描述这张图片。", "zh", "refusal"),
        ("I'm sorry, but I cannot.", "zh", "refusal"),
        ("house " * (MOST_UNITS + 1), "en", "too long"),
        ("房" * (MOST_UNITS + 1), "zh", "too long"),
        ("A sign that says “I'm sorry”, in red letters on white wood.", "en", None),
    ],
)
def test_answers_are_checked(text: str, language: str, fault: str | None) -> None:
    found = fault_of(text, language=language)
    assert found is None if fault is None else found is not None and found.startswith((fault, f"a {fault}"))


def test_a_bad_answer_is_asked_for_again(source: Path, tmp_path: Path) -> None:
    bad = ["", "I'm sorry, I can't."]
    writer = Writer(lambda key, language, attempt: bad[attempt] if attempt < len(bad) else TEXTS[language])
    assert run(source, "out", writer).failed == 0
    assert set(writer.asked.values()) == {3}


def test_what_stays_bad_is_quarantined_and_no_picture_is_lost(source: Path, tmp_path: Path) -> None:
    def says(key: str, language: str, attempt: int) -> str:
        if (key, language) == ("p3", "zh"):
            return EN
        if key == "p5":
            raise UnusableAnswer("HTTP 400: policy")
        if key == "p7":
            raise NoAnswer("HTTP 500, 6 times")
        return TEXTS[language]

    done = run(source, "out", Writer(says))
    assert (done.pictures, done.failed) == (PICTURES, 5)
    failed = [(line["key"], line["language"], line["reason"][:8]) for line in quarantine(tmp_path / "out")]
    assert failed == [
        ("p3", "zh", "wrong la"),
        *[("p5", language, "HTTP 400") for language in ("en", "zh")],
        *[("p7", language, "HTTP 500") for language in ("en", "zh")],
    ]
    for old, new in zip(read_pictures(source), read_pictures(tmp_path / "out"), strict=True):
        assert new.content == old.content
        assert new.record.captions[0] == old.record.captions[0]
        assert len(new.record.captions) == {"p3": 2, "p5": 1, "p7": 1}.get(new.record.key, 3)


def test_answers_are_tidied(source: Path, tmp_path: Path) -> None:
    untidy = ' "' + EN.replace("hill ", "hill\n\n") + '"\n'
    run(source, "out", Writer(lambda *_: untidy), languages=["en"])
    assert {one.record.captions[-1].text for one in read_pictures(tmp_path / "out")} == {EN}


def test_nothing_is_asked_twice(source: Path) -> None:
    run(source, "out", Writer())
    again = Writer()
    done = run(source, "again", again)
    assert (done.asked, done.remembered, sum(again.asked.values())) == (0, 2 * PICTURES, 0)
    other = Writer(name="another model")
    assert run(source, "other", other).asked == 2 * PICTURES


def test_the_same_picture_under_another_key_is_known(source: Path, tmp_path: Path) -> None:
    run(source, "out", Writer())
    (tmp_path / "deep").mkdir()
    copy = write_set(tmp_path / "deep" / "in", captions=[Caption(text="villa", language="en", kind="original")])
    writer = Writer()
    recaption(copy, out=tmp_path / "copy", captioner=writer, languages=["en", "zh"], cache=tmp_path / "c")
    assert not writer.asked


def test_a_language_that_is_there_is_not_asked_for(tmp_path: Path) -> None:
    source = write_set(tmp_path / "in", captions=[Caption(text=ZH, language="zh", kind="dense")])
    writer = Writer()
    assert run(source, "out", writer).asked == PICTURES
    assert {language for _, language in writer.asked} == {"en"}


def test_progress_reaches_the_end(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    recaption(
        source, out=tmp_path / "out", captioner=Writer(), languages=["en"], cache=tmp_path / "c",
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert told == [(number, PICTURES) for number in range(1, PICTURES + 1)]


def test_a_captioner_that_is_gone_ends_the_run_which_then_goes_on(source: Path, tmp_path: Path) -> None:
    big = write_set(tmp_path / "big", count=GIVE_UP + 10)

    def says(key: str, language: str, attempt: int) -> str:
        if int(key[1:]) >= 6:
            raise NoAnswer("ConnectError")
        return TEXTS[language]

    gone = Writer(says)
    with pytest.raises(DataError, match="did not answer for 10 pictures in a row .ConnectError.*again when it is back"):
        run(big, "out", gone)
    assert gone.closed == 1
    back = Writer()
    done = run(big, "out", back)
    assert (done.pictures, done.failed, done.remembered) == (GIVE_UP + 10, 0, 12)
    assert min(int(key[1:]) for key, _ in back.asked) == 6


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_a_run_that_is_interrupted_goes_on_and_ends_the_same(tmp_path: Path, source: Path, stop: int) -> None:
    run(source, "whole", Writer(), cache="one")

    def says(key: str, language: str, attempt: int) -> str:
        if key == f"p{stop}":
            raise KeyboardInterrupt
        return TEXTS[language]

    with pytest.raises(KeyboardInterrupt):
        run(source, "out", Writer(says), cache="two")
    done = run(source, "out", Writer(), cache="two")
    assert done.asked + done.remembered == 2 * PICTURES
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_unknown_languages_and_other_folders_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="captions can be made in en, zh, got 'fr'"):
        run(source, "out", Writer(), languages=["fr"])
    with pytest.raises(DataError, match="onto itself"):
        run(source, "in", Writer())
    run(source, "out", Writer())
    with pytest.raises(DataError, match="was made with captioner"):
        run(source, "out", Writer(name="another"))


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("some text that is no database, and long enough to be seen as such" * 20)
    with pytest.raises(DataError, match=r"cannot be used \(file is not a database\); it is something else: name anoth"):
        AnswerCache(path)
    assert path.read_text().startswith("some text")
    with pytest.raises(DataError, match=r"cannot be used \(File exists\); name another file"):
        AnswerCache(path / "below")


def test_a_cache_that_is_damaged_or_full_or_held_is_one_line_and_the_run_goes_on_later(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recaption_module, "PATIENCE", 0.01)
    run(source, "whole", Writer())
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))  # its first page is sound
    with pytest.raises(DataError, match=r"captions in .*c cannot be used \(.*malformed\); the file is damaged: remo"):
        run(source, "out", Writer())
    (tmp_path / "c").unlink()
    with sqlite3.connect(tmp_path / "c", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match=r"cannot be used \(database is locked\); another process holds them: wait"):
            run(source, "out", Writer())
    other.close()
    with closing(AnswerCache(tmp_path / "c")) as cache:
        cache._file.execute("PRAGMA max_page_count = 3")
        with pytest.raises(
            DataError, match=r"cannot be used \(database or disk is full\); make room and run"
        ) as caught:
            cache.put("much", EN * 10_000)
    assert "\n" not in str(caught.value)
    run(source, "out", Writer())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
