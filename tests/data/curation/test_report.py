import json
import re
from collections.abc import Callable
from pathlib import Path

from mars.data.curation.report import SAMPLES, Report, write_report
from mars.data.curation.rules import CaptionChange, Judgement
from mars.data.shards import Picture


def judgements() -> list[Judgement]:
    kept = [
        Judgement(
            key=f"k{number}", source="one", width=64, height=64 + number, stays=(0,), languages=("en",), lengths=(7,),
            scores={"clip": number / 100},
        )
        for number in range(40)
    ]  # fmt: skip
    change = CaptionChange(text="x", rule="mislabelled", value="labelled en, is zh")
    gone = [
        Judgement(key="d0", source="two", rule="side", value="8x8", width=8, height=8),
        Judgement(key="d1", source="two", rule="clip", value="0.9", width=64, height=64, scores={"clip": 0.9}),
        Judgement(key="d2", source="two", rule="mislabelled", value="<b>&", width=64, height=64, changes=(change,)),
    ]
    return kept + gone


def test_every_picture_is_counted_once_in_each_table() -> None:
    report = Report()
    for one in judgements():
        report.add(one)
    table = report.table()
    assert (table["pictures"], table["kept"]) == (43, 40)
    assert table["dropped"] == {"side": 1, "clip": 1, "mislabelled": 1}
    assert table["sources"] == {"one": {"kept": 40}, "two": {"clip": 1, "mislabelled": 1, "side": 1}}
    assert table["captions"] == {"mislabelled, dropped": 1}
    histograms = table["histograms"]
    for name in ("shorter side, pixels", "longer side over shorter"):
        assert (sum(histograms[name]["kept"]), sum(histograms[name]["dropped"])) == (40, 3)
    assert (sum(histograms["score: clip"]["kept"]), sum(histograms["score: clip"]["dropped"])) == (40, 1)
    sides = dict(zip(*(histograms["shorter side, pixels"][name] for name in ("from", "dropped")), strict=True))
    assert sides[0] == 1
    assert sides[64] == 2
    assert json.loads(json.dumps(table)) == table


def test_the_page_shows_samples_of_each_rule_and_escapes_what_it_shows(
    tmp_path: Path, make_picture: Callable[..., Picture], write_set: Callable[..., Path]
) -> None:
    found = judgements()
    captions = [("<script>alert(1)</script>", "en")]
    source = write_set(tmp_path / "set", [make_picture(one.key, number=1, captions=captions) for one in found])
    report = Report()
    for one in found:
        report.add(one)
    write_report(tmp_path, report, source=source)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<figure>") == page.count("data:image/jpeg;base64,") == SAMPLES + 3
    assert re.findall("<h2>(.*?)</h2>", page) == ["Kept", "Dropped: clip", "Dropped: mislabelled", "Dropped: side"]
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "http" not in page.lower()
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report.table()


def test_nothing_is_a_report_too(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    write_report(tmp_path, Report(), source=write_set(tmp_path / "set", []))
    assert "0 of 0 pictures kept" in (tmp_path / "report.html").read_text("utf-8")


def test_the_samples_do_not_depend_on_the_order() -> None:
    one, other = Report(), Report()
    for judgement in judgements() * 3:
        one.add(judgement)
    for judgement in reversed(judgements() * 3):
        other.add(judgement)
    assert sorted(one.samples["kept"])[:SAMPLES] == sorted(other.samples["kept"])[:SAMPLES]
