import json
from pathlib import Path

import pytest

from benchmarks import serve_load


@pytest.mark.slow
def test_everybody_is_answered_right_or_refused(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as ended:
        serve_load.main(["--seconds", "15", "--model", str(tiny_model), "--out", str(out)])
    found = json.loads(out.read_text("utf-8"))
    assert ended.value.code == 0, found["failures"]
    assert found["counts"]["200"] > 100
    assert found["counts"]["gone"] > 20
    assert found["counts"]["429"] > 5
    assert 0 < found["answer_seconds"]["p50"] < found["answer_seconds"]["p99"]
