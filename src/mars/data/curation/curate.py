"""Curates a picture set: judge every picture, find duplicates among all, write what stays, report.

    OUT/judged/000000.jsonl     what was found of the first 1,000 pictures; gone when all is done
    OUT/shard-000000.tar ...    pictures that stay, their bytes as they were, with their scores
    OUT/dropped.jsonl           one line per picture that was dropped: rule and value
    OUT/captions.jsonl          one line per caption that was dropped or labelled anew in a picture that stays
    OUT/report.json, .html, kept.png, dropped-RULE.png

The set is read twice, and once more up to the last picture on a contact sheet. Killed at any moment, it goes on behind
the last 1,000 that were judged, or behind the last shard. Memory: about 150 bytes per picture, for duplicates.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mars.config import to_dict
from mars.data.curation.config import CurationConfig, DuplicateRules
from mars.data.curation.duplicates import CELLS, nearest_kept
from mars.data.curation.report import Report, write_report
from mars.data.curation.rules import DUPLICATE, Judge, Judgement, kept_captions
from mars.data.picture_set import set_digest, set_size
from mars.data.shard_folder import ShardFolder
from mars.data.shards import read_pictures
from mars.errors import DataError
from mars.files import whole_file

CHUNK = 1000
"""Pictures that are judged together."""
BATCH = 32
"""Pictures in memory at once while judging."""


def curate(
    source: Path, *, out: Path, config: CurationConfig, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Writes the pictures of a set that pass every rule to `out`, or goes on with it; returns the report.

    Args:
        source: a folder of shards, or one shard.
        progress: called with how many pictures were judged, and how many there are.

    Raises:
        ConfigError: if a scorer cannot be opened.
        DataError: if the source is no picture set, or `out` holds something else or cannot be written.
    """
    out = out.expanduser().resolve()
    if out == source.expanduser().resolve():
        raise DataError(f"{out} cannot be curated onto itself; name another folder")
    judge = Judge(config)
    settings = {"command": "curate", "source": set_digest(source), **_settings(judge)}
    with ShardFolder(out, settings=settings, journals=("dropped", "captions")) as folder:
        judged = out / "judged"
        if not folder.finished:
            _judge(judged, judge=judge, source=source, progress=progress)
            copies = _copies(judged, config.duplicates)
            _write(folder, judged=judged, source=source, copies=copies)
            report = Report()
            for judgement in _final(judged, copies):
                report.add(judgement)
            write_report(out, report, source=source)
            folder.finish()
        shutil.rmtree(judged, ignore_errors=True)
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return found


def _settings(judge: Judge) -> dict[str, Any]:
    """What decides the result; lists and weights by their content, so that others are not taken for the same."""
    table = to_dict(judge.config)
    table["scorers"] = [
        {**each, "digest": scorer.digest} for each, scorer in zip(table["scorers"], judge.scorers, strict=True)
    ]
    try:
        table["remove"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in judge.config.remove]
    except OSError as error:
        raise DataError(f"the list of what to remove {error.filename} cannot be read: {error.strerror}") from None
    return table


def _judge(folder: Path, *, judge: Judge, source: Path, progress: Callable[[int, int], None] | None) -> None:
    """The first pass: files of CHUNK judgements, each of which appears whole, and `all` when there are no more."""
    if (folder / "all").is_file():
        return
    chunk = len(list(folder.glob("*.jsonl")))
    pictures = islice(read_pictures(source), chunk * CHUNK, None)
    total = set_size(source) if progress is not None else 0
    while batch := list(islice(pictures, min(BATCH, CHUNK))):
        lines: list[str] = []
        while batch:
            lines += [judgement.to_json() + "\n" for judgement in judge.judge(batch)]
            batch = list(islice(pictures, min(BATCH, CHUNK - len(lines))))
        _put(folder / f"{chunk:06d}.jsonl", "".join(lines))
        if progress is not None:
            progress(chunk * CHUNK + len(lines), total)
        chunk += 1
    _put(folder / "all", "")


def _put(path: Path, text: str) -> None:
    with whole_file(path, error=DataError) as partial:
        partial.write_text(text, "utf-8")


def _judged(folder: Path) -> Iterator[Judgement]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(Judgement.from_json, lines)


def _copies(folder: Path, rules: DuplicateRules) -> dict[int, str]:
    """The pictures that duplicate another, by their place in the set, and the key of the one that stays."""
    if rules.distance is None:
        return {}
    hashes, thumbnails, worth = array("Q"), bytearray(), array("q")
    places = array("q")
    for place, found in enumerate(_judged(folder)):
        if not found.rule:
            places.append(place)
            hashes.append(int(found.hash, 16))
            thumbnails += bytes.fromhex(found.colours)
            worth.extend((found.width * found.height, max(found.lengths, default=0)))
    order = np.arange(len(places))
    if rules.keep == "best":
        pixels, length = np.array(worth, dtype=np.int64).reshape(-1, 2).T
        order = np.lexsort((order, -length, -pixels))
    kept_as = nearest_kept(
        np.array(hashes, dtype=np.uint64),
        np.frombuffer(thumbnails, dtype=np.uint8).reshape(-1, 3 * CELLS**2),
        order=order,
        distance=rules.distance,
        colour=rules.colour,
    )
    copies = {places[copy]: places[kept_as[copy]] for copy in np.flatnonzero(kept_as >= 0)}
    wanted = set(copies.values())
    keys = {place: found.key for place, found in enumerate(_judged(folder)) if place in wanted}
    return {copy: keys[kept] for copy, kept in copies.items()}


def _final(folder: Path, copies: Mapping[int, str]) -> Iterator[Judgement]:
    for place, found in enumerate(_judged(folder)):
        yield replace(found, rule=DUPLICATE, value=copies[place]) if place in copies else found


def _write(folder: ShardFolder, *, judged: Path, source: Path, copies: Mapping[int, str]) -> None:
    """The second pass: what stays into shards, what does not into a line of `dropped`."""
    done = folder.consumed or 0
    pairs = zip(read_pictures(source), _final(judged, copies), strict=True)
    for place, (picture, found) in enumerate(islice(pairs, done, None), done):
        about = {"key": found.key, "source": found.source}
        if found.rule:
            folder.note("dropped", {**about, "rule": found.rule, "value": found.value})
            continue
        for change in found.changes:
            folder.note("captions", {**about, **asdict(change)})
        record = replace(
            picture.record,
            captions=kept_captions(picture.record, found),
            width=found.width,
            height=found.height,
            scores={**picture.record.scores, **found.scores},
        )
        folder.add(replace(picture, record=record), consumed=place + 1)
