"""What a curation did, as report.json and as one page with histograms and contact sheets."""

import base64
import io
import json
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from mars.data.curation.rules import Judgement
from mars.data.shards import read_pictures
from mars.errors import DataError
from mars.files import whole_file
from mars.picture import on_white_page

SAMPLES = 24
"""Pictures on a contact sheet: of those that stay, and of those that each rule dropped."""
THUMBNAIL = 112
SCORE_BINS = 12
KEPT = "kept"
EDGES = {
    "shorter side, pixels": (0, 32, 64, 128, 256, 512, 1024, 2048),
    "longer side over shorter": (1, 1.05, 1.25, 1.5, 2, 3, 5),
    "caption length, words or characters": (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 257),
}
"""Where the bars of a histogram begin; the last one is open."""


class Report:
    """Counts judgements; memory does not grow with them, but for 8 bytes a score."""

    def __init__(self) -> None:
        self.rules: Counter[str] = Counter()
        self.sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.caption_rules: Counter[str] = Counter()
        self.languages: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.bars = {name: {True: [0] * len(edges), False: [0] * len(edges)} for name, edges in EDGES.items()}
        self.scores: defaultdict[str, dict[bool, array[float]]] = defaultdict(
            lambda: {True: array("d"), False: array("d")}
        )
        self.samples: defaultdict[str, list[tuple[int, str, str]]] = defaultdict(list)
        """Of each rule: a number made from the key, the key, the value."""

    def add(self, found: Judgement) -> None:
        """Counts one picture."""
        rule, kept = found.rule or KEPT, not found.rule
        self.rules[rule] += 1
        self.sources[found.source][rule] += 1
        for change in found.changes:
            self.caption_rules[f"{change.rule}, {'labelled anew' if change.language else 'dropped'}"] += 1
        self.languages["kept" if kept else "dropped"].update(found.languages)
        if found.width and found.height:
            sides = sorted((found.width, found.height))
            self._count("shorter side, pixels", sides[0], kept=kept)
            self._count("longer side over shorter", sides[1] / sides[0], kept=kept)
        for length in found.lengths:
            self._count("caption length, words or characters", length, kept=kept)
        for name, score in found.scores.items():
            self.scores[name][kept].append(score)
        self._sample(rule, found)

    def _count(self, name: str, value: float, *, kept: bool) -> None:
        self.bars[name][kept][max(0, int(np.searchsorted(EDGES[name], value, side="right")) - 1)] += 1

    def _sample(self, rule: str, found: Judgement) -> None:
        """The pictures whose keys have the smallest checksums: as good as drawn by chance, and the same every time."""
        some = self.samples[rule]
        some.append((zlib.crc32(found.key.encode()), found.key, found.value))
        if len(some) > 2 * SAMPLES:
            some.sort()
            del some[SAMPLES:]

    def table(self) -> dict[str, Any]:
        """As JSON."""
        total, kept = self.rules.total(), self.rules[KEPT]
        return {
            "pictures": total,
            "kept": kept,
            "dropped": dict(sorted((rule, count) for rule, count in self.rules.items() if rule != KEPT)),
            "sources": {name: dict(sorted(counts.items())) for name, counts in sorted(self.sources.items())},
            "captions": dict(sorted(self.caption_rules.items())),
            "languages": {name: dict(sorted(counts.items())) for name, counts in sorted(self.languages.items())},
            "histograms": self._histograms(),
        }

    def _histograms(self) -> dict[str, Any]:
        found = {
            name: {"from": list(EDGES[name]), "kept": counts[True], "dropped": counts[False]}
            for name, counts in self.bars.items()
        }
        for name, values in sorted(self.scores.items()):
            edges = np.histogram_bin_edges(np.concatenate([values[True], values[False]]), bins=SCORE_BINS)
            counts = {kept: np.histogram(values[kept], bins=edges)[0].tolist() for kept in values}
            lowest = [float(f"{edge:.4g}") for edge in edges[:-1]]
            found[f"score: {name}"] = {"from": lowest, "kept": counts[True], "dropped": counts[False]}
        return found


def write_report(out: Path, report: Report, *, source: Path) -> None:
    """Writes report.json and report.html, whose contact sheets show pictures of `source`.

    Raises:
        DataError: if the source cannot be read or the folder not be written.
    """
    sheets = _sheets(report, source)
    table = report.table()
    page = _PAGE.render(table=table, sheets=sheets, side=THUMBNAIL)
    for name, text in (("report.html", page), ("report.json", json.dumps(table, ensure_ascii=False, indent=1) + "\n")):
        with whole_file(out / name, error=DataError) as partial:
            partial.write_text(text, "utf-8")


def _sheets(report: Report, source: Path) -> dict[str, list[dict[str, str]]]:
    """For each rule its samples: key, value, captions, and a picture as a data URL (empty where it cannot be drawn)."""
    wanted = {key: (rule, value) for rule, some in report.samples.items() for _, key, value in sorted(some)[:SAMPLES]}
    sheets: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    missing = len(wanted)
    for picture in read_pictures(source) if wanted else ():
        record = picture.record
        if record.key not in wanted:
            continue
        rule, value = wanted[record.key]
        captions = " | ".join(caption.text for caption in record.captions)
        sheets[rule].append(
            {"key": record.key, "value": value, "captions": captions, "url": _thumbnail(picture.content)}
        )
        missing -= 1
        if not missing:
            break
    rules = sorted(sheets, key=lambda rule: (rule != KEPT, rule))
    return {rule: sheets[rule] for rule in rules}


def _thumbnail(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = on_white_page(image, size=(THUMBNAIL, THUMBNAIL))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ""
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _bars(histogram: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Rows of a histogram: from what on, counts, and widths in percent."""
    most = max(map(sum, zip(histogram["kept"], histogram["dropped"], strict=True)), default=0) or 1
    return [
        {"from": start, "kept": kept, "dropped": gone, "green": 100 * kept / most, "red": 100 * gone / most}
        for start, kept, gone in zip(histogram["from"], histogram["kept"], histogram["dropped"], strict=True)
    ]


_environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_environment.filters["bars"] = _bars
_PAGE = _environment.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
