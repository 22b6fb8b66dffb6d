import sys

import pytest

from tests.cli.conftest import Run


def test_without_gradio_one_line_says_how_to_get_the_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mars.cli.serve"], "find_spec", lambda name: None)
    line = "mars: the page needs Gradio (pip install 'mars-t2i[server]'); the API is served without it"
    for options, told in (([], True), (["--no-page"], False)):
        code, _, error = run("serve", "--port", 0, "--model", "nowhere", *options)
        assert code != 0  # there is no such model, and nothing is served
        assert (line in error.splitlines()) == told
