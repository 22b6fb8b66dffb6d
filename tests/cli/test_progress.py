import io
import sys

import pytest

from mars.cli.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with bar("drawing") as report:
        assert report is None
    assert log.getvalue() == ""


def test_on_a_terminal_the_bar_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with bar("drawing") as report:
        assert report is not None
        report(3, 12)
    assert "drawing" in screen.getvalue()
    assert "3/12" in screen.getvalue()


def test_what_is_printed_to_a_pipe_goes_there_while_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    with bar("drawing"):
        print("a.png")
    assert piped.getvalue() == "a.png\n"
