"""Sources to a folder of shards: every picture once, in the order of the sources, or in quarantine with the reason."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from mars.data.ingestion.items import Item
from mars.data.ingestion.records import Columns, picture_of
from mars.data.ingestion.source import Source, open_source
from mars.data.shard_folder import SHARD_BYTES, SHARD_PICTURES, ShardFolder
from mars.data.shards import Picture
from mars.data.workers import WorkerDied, in_order
from mars.errors import DataError

_DIED = "its process died, alone too (out of memory, or a fault in a decoder)"


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the items of the sources."""

    pictures: int
    shards: int
    without_caption: int
    refused: dict[str, int]
    """How many for which reason, the most frequent first."""
    lacks: dict[str, tuple[str, ...]]
    """Columns of captions that were named and that a source does not have."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """An item and where it stands: number of the source, of the part, of the item."""

    place: tuple[int, int, int]
    source: str
    item: Item


def ingest(
    sources: Sequence[Path],
    *,
    out: Path,
    columns: Columns | None = None,
    workers: int = 0,
    max_pictures: int = SHARD_PICTURES,
    max_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int | None], None] | None = None,
) -> IngestReport:
    """Writes the pictures of all sources into shards below `out`, or continues a run that was stopped.

    Args:
        workers: processes that decode pictures; 0 does it in this one. The shards are the same for any number.
        max_pictures: in a shard.
        max_bytes: of a shard's pictures, about.
        progress: called with how many pictures are written, and None.

    Raises:
        DataError: if a source is none, has the name of another one or no picture that can be used, or `out` holds
            something else or cannot be written.
    """
    columns = columns or Columns()
    opened = [open_source(path, columns=columns) for path in sources]
    names = Counter(source.name for source in opened)
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError(f"sources must have different names, got {twice[0]} twice; keys are made from them")
    if absent := set(columns.caption_names).intersection(*(source.lacks for source in opened)):
        raise DataError(f"no source has the column {min(absent)} of captions; leave it out or spell it as they do")
    for path in sources:
        if out.resolve().is_relative_to(path.resolve()):
            raise DataError(f"shards must lie outside their source, got {out} in {path}; name another folder")
    settings = {
        "command": "ingest",
        "sources": list(names),
        "columns": asdict(columns),
        **{f"files of {source.name}": source.listing for source in opened},
    }
    with ShardFolder(out, settings=settings, max_pictures=max_pictures, max_bytes=max_bytes) as folder:
        if not folder.finished:
            _fill(folder, opened, columns=columns, workers=workers, progress=progress)
        return _report(folder, lacks={source.name: source.lacks for source in opened if source.lacks})


def _fill(
    folder: ShardFolder,
    sources: Sequence[Source],
    *,
    columns: Columns,
    workers: int,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    start = folder.consumed or {"place": (0, 0, 0), "without_caption": 0}
    bare, done = start["without_caption"], folder.pictures
    tasks = _tasks(sources, start=tuple(start["place"]))
    for task, result in in_order(partial(_look, columns=columns), tasks, workers=workers):
        if isinstance(result, Picture):
            source, part, item = task.place
            bare, done = bare + (not result.record.captions), done + 1
            folder.add(result, consumed={"place": (source, part, item + 1), "without_caption": bare})
        else:
            reason = _DIED if isinstance(result, WorkerDied) else result
            folder.note("quarantine", {"source": f"{task.source}/{task.item.name}", "reason": reason})
        if progress is not None:
            progress(done, None)
    if not done:
        raise DataError(
            f"none of {folder.lines['quarantine']:,} files is a picture that can be used; "
            f"{folder.path / 'quarantine.jsonl'} says why"
        )
    folder.finish()


def _tasks(sources: Sequence[Source], *, start: tuple[int, int, int]) -> Iterator[_Task]:
    """Every item from `start` on."""
    for number, source in enumerate(sources):
        if number < start[0]:
            continue
        for place, part in enumerate(source.parts()):
            if (number, place) < start[:2]:
                continue
            first = start[2] if (number, place) == start[:2] else 0
            for index, item in enumerate(islice(part(), first, None), first):
                yield _Task(place=(number, place, index), source=source.name, item=item)


def _look(task: _Task, *, columns: Columns) -> Picture | str:
    return picture_of(task.item, source=task.source, columns=columns)


def _report(folder: ShardFolder, *, lacks: dict[str, tuple[str, ...]]) -> IngestReport:
    reasons = Counter[str]()
    with (folder.path / "quarantine.jsonl").open("rb") as lines:
        for line in lines:
            reasons[json.loads(line)["reason"].split(" (")[0]] += 1
    return IngestReport(
        pictures=folder.pictures,
        shards=len(folder.shards),
        without_caption=folder.consumed["without_caption"],
        refused=dict(reasons.most_common()),
        lacks=lacks,
    )
