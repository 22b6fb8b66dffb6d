from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


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
