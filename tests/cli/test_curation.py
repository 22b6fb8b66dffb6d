"""`mars data curate` and `mars data recaption`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mars.data.shards import Caption, Picture, Record, read_pictures, write_pictures
from tests.data.conftest import art, encoded

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures, of which the second is small and the fourth a copy of the first."""

    def picture(key: str, number: int, side: int) -> Picture:
        captions = (Caption(text="a small red house on a hill", language="en", kind="original"),)
        record = Record(
            key=key, concept="", style="", split="train", source="test", licence="CC0-1.0", captions=captions
        )
        return Picture(record=record, content=encoded(art(number, size=(side, side))))

    shard = tmp_path / "shard.tar"
    write_pictures(shard, [picture("a", 1, 64), picture("b", 2, 40), picture("c", 3, 64), picture("d", 1, 64)])
    return shard


def keys(folder: Path) -> list[str]:
    return [picture.record.key for picture in read_pictures(folder)]


def test_pictures_are_curated_by_the_default_rules(run: Run, pictures: Path) -> None:
    code, out, err = run("data", "curate", pictures, "--out", "kept")
    assert (code, err) == (0, "")
    assert "kept 2 of 4 pictures; dropped: duplicate 1, side 1" in out
    assert keys(Path("kept")) == ["a", "c"]
    assert Path("kept/report.html").is_file()
    assert run("data", "curate", pictures, "--out", "kept")[:2] == (0, out)


def test_rules_come_from_a_file_and_from_the_command(run: Run, pictures: Path) -> None:
    scorer = 'scorer = "mars.data.curation.scorers:Sharpness"'
    Path("curate.toml").write_text(f"[duplicates]\nkeep = 'first'\n[[scorers]]\n{scorer}\n")
    code, out, _ = run(
        "data", "curate", pictures, "--out", "kept", "--config", "curate.toml", "--set", "size.least_side=32"
    )
    assert code == 0
    assert "kept 3 of 4" in out
    assert all("sharpness" in picture.record.scores for picture in read_pictures(Path("kept")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "size.least=3"], "did you mean size.least_side"),
        (["--config", "absent.toml"], "no configuration file"),
        (["--set", "remove=['absent.txt']"], "absent.txt"),
    ],
)
def test_wrong_rules_are_one_line_and_write_nothing(run: Run, pictures: Path, arguments: list[str], said: str) -> None:
    code, out, err = run("data", "curate", pictures, "--out", "kept", *arguments)
    assert code != 0
    assert out == ""
    assert err.startswith("mars: ")
    assert said in err
    assert err.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_mars_describes_pictures_itself_and_loses_none(run: Run, pictures: Path, tiny_model: Path) -> None:
    code, out, err = run(
        "data", "recaption", pictures, "--out", "said", "--model", tiny_model, "--language", "en", "--cache", "c.sqlite"
    )
    assert (code, err) == (0, "")
    assert "4 pictures" in out
    assert keys(Path("said")) == keys(pictures)
    added = [len(picture.record.captions) - 1 for picture in read_pictures(Path("said"))]
    refused = [json.loads(line) for line in Path("said/quarantine.jsonl").read_text("utf-8").splitlines()]
    assert sum(added) + len(refused) == 4  # what a random model says may be unusable, and is told then


def test_an_endpoint_needs_a_model_and_a_url(run: Run, pictures: Path) -> None:
    for arguments, said in (
        (["--endpoint", "http://127.0.0.1:1/v1"], "--model"),
        (["--endpoint", "x", "-m", "y"], "URL"),
    ):
        code, out, err = run("data", "recaption", pictures, "--out", "said", *arguments)
        assert code != 0
        assert out == ""
        assert said in err
        assert err.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_an_endpoint_that_is_gone_is_told_and_nothing_is_finished(run: Run, pictures: Path) -> None:
    code, out, err = run(
        "data", "recaption", pictures, "--out", "said", "--endpoint", "http://127.0.0.1:1/v1", "--model", "seer",
        "--tries", "1", "--cache", "c.sqlite",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert "seer did not answer for 4 pictures in a row (ConnectError" in err
    assert err.count("\n") == 1
    code, _, err = run("data", "curate", "said", "--out", "kept")
    assert code == 1
    assert "not finished" in err
