from pathlib import Path

import pytest

from mars.cli import main


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
def test_options_that_do_not_fit_are_one_line(
    options: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "0", "--model", str(tiny_model), *options])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
