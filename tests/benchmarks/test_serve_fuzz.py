from collections import Counter
from pathlib import Path

import pytest

from benchmarks import serve_fuzz
from benchmarks.hostile_requests import KINDS, hostile
from benchmarks.serve_fuzz import Found, fuzz, growth
from benchmarks.server_process import PROBE, ask, digest, idle
from mars.pipeline import MarsPipeline
from mars.server.guard import LOG
from mars.server.settings import Limits, Settings
from tests.server.conftest import Lines, running


def test_a_number_is_always_the_same_request_and_all_kinds_come_up() -> None:
    made = [hostile(number, seed=3) for number in range(400)]
    assert made == [hostile(number, seed=3) for number in range(400)]
    assert {one.kind for one in made} == KINDS.keys()
    assert made != [hostile(number, seed=4) for number in range(400)]


def test_hostile_requests_do_no_harm(tiny_model: Path) -> None:
    found, log = Found(), Lines()
    LOG.addHandler(log)
    with running(MarsPipeline.from_pretrained(tiny_model), Settings(limits=Limits(body_seconds=2))) as one:
        drawn = ask(one.port, "/v1/images/generations", PROBE)[1]
        fuzz(one.port, range(300), seed=1, threads=8, found=found)
        assert idle(one.port)
        assert digest(ask(one.port, "/v1/images/generations", PROBE)[1]) == digest(drawn)
    LOG.removeHandler(log)
    assert found.failures == []
    assert [line for line in log.lines if line["level"] == "error"] == []
    total = sum(found.statuses.values(), Counter())
    assert total["400"] > 100
    assert total["200"] > 10
    assert total["unread"] > 3


def test_growth_is_what_memory_does_not_give_back() -> None:
    assert growth([0, 500, 900, 900, 950, 900, 2000, 900], requests=800) == 0
    assert growth([0, 100, 200, 300, 400, 500, 600, 700], requests=800) == 1


@pytest.mark.slow
def test_the_command_tells_what_it_found(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as ended:
        serve_fuzz.main(["--requests", "400", "--seed", "2", "--model", str(tiny_model), "--out", str(out)])
    assert ended.value.code == 0
    assert '"failures": []' in out.read_text("utf-8")
