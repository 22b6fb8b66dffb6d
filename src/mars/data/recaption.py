"""New captions for a picture set: dense descriptions in several languages by any captioner.

Every picture of the source is in the result, with the captions that it had. A new caption is checked; one that stays
unusable is left out, and `quarantine.jsonl` says which and why. Answers are remembered on disk by picture, captioner
and prompt, so nothing is asked twice; a run that was killed goes on. Knows nothing about HTTP (`endpoint`) or models.
"""

import asyncio
import hashlib
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from mars.data.curation.language import language_of, units
from mars.data.picture_set import set_digest, set_size
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, read_pictures
from mars.errors import DataError
from mars.files import reason

KIND = "dense"
MOST_UNITS = 400
"""Words, or Chinese characters, of a caption that is taken."""
GIVE_UP = 10
"""Pictures in a row without an answer after which the captioner counts as gone."""
AHEAD = 4
"""Pictures that wait for captions, times those that are asked for at once."""
PATIENCE = 5.0
"""Seconds to wait for another process that writes to the same cache."""
_REMEDIES = {
    sqlite3.SQLITE_FULL: "make room and run the same command again",
    sqlite3.SQLITE_BUSY: "another process holds them: wait for it, or name another file",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: remove it, or name another one",
    sqlite3.SQLITE_NOTADB: "it is something else: name another file",
}
_REFUSAL = re.compile(
    r"\W*(i(['’]m| am) (sorry|unable|not able)|i (can(['’]t|not)|am unable)|sorry|as an ai\b|unfortunately|"
    r"抱歉|对不起|很遗憾|我(无法|不能)|无法|作为一个?(人工智能|AI))",
    re.IGNORECASE,
)


class UnusableAnswer(Exception):
    """The captioner answered, and what it said of this picture cannot be used."""


class NoAnswer(Exception):
    """The captioner did not answer, however often it was asked."""


class Captioner(Protocol):
    """What describes pictures."""

    @property
    def name(self) -> str:
        """Of the model; another one's answers are not taken for its own."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """What it is asked, per language; these are the languages that it knows."""

    @property
    def answers(self) -> int:
        """How often it is asked where an answer cannot be used."""

    @property
    def at_once(self) -> int:
        """Questions that it takes at the same time."""

    async def caption(self, picture: Picture, *, language: str, attempt: int) -> str:
        """Describes a picture.

        Raises:
            UnusableAnswer: if it refuses this picture.
            NoAnswer: if it does not answer.
            DataError: if no picture will have an answer.
        """

    async def close(self) -> None:
        """Called at the end."""


@dataclass(kw_only=True)
class Recaptioned:
    """What a run did."""

    pictures: int = 0
    """In the whole result."""
    failed: int = 0
    """Captions that are missing in it."""
    asked: int = 0
    """Captions made in this run."""
    remembered: int = 0
    """Captions of this run that were known from an earlier one."""


def fault_of(text: str, *, language: str) -> str | None:
    """Why a caption cannot be used; None where it can."""
    if not text:
        return "empty"
    if _REFUSAL.match(text):
        return f"a refusal: {text[:80]}"
    if len(units(text)) > MOST_UNITS:
        return f"too long: {len(units(text))} words or characters, at most {MOST_UNITS}"
    found = language_of(text, claimed=language)
    return None if found == language else f"wrong language: asked for {language}, got {found}: {text[:80]}"


class AnswerCache:
    """Captions on disk by picture, captioner and prompt.

    Raises:
        DataError: from every method, if the file is no such cache or damaged, the disk is full, or another process
            holds it for long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)
            try:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)"
                )
            except sqlite3.Error:
                self._file.close()
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def get(self, question: str) -> str | None:
        """The answer to a question, if it is known."""
        with self._told():
            found = self._file.execute("SELECT answer FROM answers WHERE question = ?", (question,)).fetchone()
        return str(found[0]) if found else None

    def put(self, question: str, answer: str) -> None:
        """Remembers an answer."""
        with self._told():
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (question, answer))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            code = getattr(error, "sqlite_errorcode", None) or 0
            do = _REMEDIES.get(code & 0xFF, "name another file")  # behind the low byte are details
            raise DataError(f"the captions in {self.path} cannot be used ({reason(error)}); {do}") from error


def recaption(
    source: Path,
    *,
    out: Path,
    captioner: Captioner,
    languages: Sequence[str],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Recaptioned:
    """Writes the pictures of a set to `out` with a dense caption per language, or goes on with it.

    A picture that has a dense caption in a language is not asked about again.

    Args:
        source: a folder of shards, or one shard.
        cache: the file that remembers answers.
        progress: called with how many pictures are done and how many there are.

    Raises:
        DataError: if the captioner does not know a language or is gone, or a place cannot be read or written.
    """
    for language in languages:
        if language not in captioner.prompts:
            raise DataError(f"captions can be made in {', '.join(captioner.prompts)}, got {language!r}")
    if out.expanduser().resolve() == source.expanduser().resolve():
        raise DataError(f"{out} cannot be written onto itself; name another folder")
    prompts = {language: captioner.prompts[language] for language in languages}
    settings = {"command": "recaption", "source": set_digest(source), "captioner": captioner.name, "prompts": prompts}
    with closing(AnswerCache(cache)) as answers, ShardFolder(out, settings=settings) as folder:
        run = _Run(folder=folder, captioner=captioner, languages=tuple(languages), answers=answers)
        if not folder.finished:
            total = set_size(source) if progress is not None else 0
            asyncio.run(run.all(source, lambda done: progress(done, total) if progress is not None else None))
            folder.finish()
        return replace(run.done, pictures=folder.pictures, failed=folder.lines["quarantine"])


@dataclass(kw_only=True)
class _Found:
    captions: list[Caption] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Language and reason."""
    answered: bool = True


class _Run:
    """Asks for captions ahead of what is written; writes in the order of the source."""

    def __init__(
        self, *, folder: ShardFolder, captioner: Captioner, languages: tuple[str, ...], answers: AnswerCache
    ) -> None:
        self.folder, self.captioner, self.languages, self.answers = folder, captioner, languages, answers
        self.done = Recaptioned()
        self._slots = asyncio.Semaphore(captioner.at_once)
        self._unanswered: list[str] = []
        """Reasons, of the last pictures in a row."""
        self._answered = False

    async def all(self, source: Path, progress: Callable[[int], object]) -> None:
        """Every picture behind what the folder holds."""
        waiting: deque[tuple[int, Picture, asyncio.Task[_Found]]] = deque()
        start = self.folder.consumed or 0
        try:
            for place, picture in enumerate(islice(read_pictures(source), start, None), start):
                waiting.append((place, picture, asyncio.create_task(self._captions(picture))))
                if len(waiting) >= AHEAD * self.captioner.at_once:
                    progress(await self._write(*waiting.popleft()))
            while waiting:
                progress(await self._write(*waiting.popleft()))
            if self._unanswered and not self._answered:  # a set of a few pictures: it was never there
                self._give_up()
        finally:
            for *_, task in waiting:
                task.cancel()
            await asyncio.gather(*(task for *_, task in waiting), return_exceptions=True)
            await self.captioner.close()

    async def _write(self, place: int, picture: Picture, task: asyncio.Task[_Found]) -> int:
        """Adds a picture with what was found; returns how many are done."""
        found, record = await task, picture.record
        self._answered = self._answered or found.answered
        self._unanswered = [] if found.answered else [*self._unanswered, found.faults[-1][1]]
        if len(self._unanswered) >= GIVE_UP:
            self._give_up()
        for language, fault in found.faults:
            note = {"source": record.source, "key": record.key, "language": language, "reason": fault}
            self.folder.note("quarantine", note)
        captions = (*record.captions, *found.captions)
        self.folder.add(replace(picture, record=replace(record, captions=captions)), consumed=place + 1)
        return place + 1

    def _give_up(self) -> None:
        raise DataError(
            f"{self.captioner.name} did not answer for {len(self._unanswered)} pictures in a row "
            f"({self._unanswered[-1]}); what was written is whole: run the same command again when it is back"
        )

    async def _captions(self, picture: Picture) -> _Found:
        """New captions in the languages that lack one."""
        found = _Found()
        has = {caption.language for caption in picture.record.captions if caption.kind == KIND}
        for language in self.languages:
            if language in has:
                continue
            try:
                text = await self._caption(picture, language)
                found.captions.append(Caption(text=text, language=language, kind=KIND))
            except (UnusableAnswer, NoAnswer) as error:
                found.faults.append((language, str(error)))
                found.answered &= isinstance(error, UnusableAnswer)
        return found

    async def _caption(self, picture: Picture, language: str) -> str:
        """A caption that can be used, from the cache or the captioner."""
        parts = (hashlib.sha256(picture.content).hexdigest(), self.captioner.name, self.captioner.prompts[language])
        question = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        known = self.answers.get(question)
        if known is not None:
            self.done.remembered += 1
            return known
        fault: str | None = "never asked"
        for attempt in range(self.captioner.answers):
            try:
                async with self._slots:
                    answer = await self.captioner.caption(picture, language=language, attempt=attempt)
            except UnusableAnswer as error:
                fault = str(error)
                continue
            text = " ".join(answer.split()).strip('"“”「」 ')
            fault = fault_of(text, language=language)
            if fault is None:
                self.answers.put(question, text)
                self.done.asked += 1
                return text
        raise UnusableAnswer(fault)
