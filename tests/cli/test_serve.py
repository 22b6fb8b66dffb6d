import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "spark"], "the engine must be local or ray, got spark"),
        (["--replicas", "2"], "replicas are for --engine ray"),
        (
            ["--engine", "ray", "--replicas", "3", "--max-replicas", "2"],
            "max-replicas must be at least replicas (3), got 2",
        ),
        (["--max-n", "100"], "the queue must hold the pictures of one request (100), got 64"),
    ],
)
def test_options_that_do_not_fit_are_one_line(run: Run, tiny_model: Path, options: list[str], message: str) -> None:
    code, _, err = run("serve", "--port", "0", "--model", tiny_model, *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_without_gradio_one_line_says_how_to_get_the_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mars.cli.serve"], "find_spec", lambda name: None)
    line = "mars: the page needs Gradio (pip install 'mars-t2i[server]'); the API is served without it"
    for options, told in (([], True), (["--no-page"], False)):
        code, _, error = run("serve", "--port", 0, "--model", "nowhere", *options)
        assert code != 0  # there is no such model, and nothing is served
        assert (line in error.splitlines()) == told
