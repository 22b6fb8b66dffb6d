import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_an_official_file_is_drawn_where_its_scorer_looks(run: Run, tiny_model: Path) -> None:
    Path("evaluation_metadata.jsonl").write_text('{"tag": "single_object", "prompt": "a bench"}\n')
    arguments = ["prompts", "geneval", "evaluation_metadata.jsonl", "--out", "out", "--n", 2, "-m", tiny_model]
    code, out, err = run(*arguments, "--candidates", 1)
    assert (code, err) == (0, "")
    assert json.loads(out)["pictures"] == 2
    assert Path("out/00000/samples/0001.png").is_file()
    code, _, err = run(*arguments, "--candidates", 1, "--seed", 3)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "another model, prompt file or setting" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["draw", "x.txt", "--out", "out"], "the bench must be one of coco, t2i-compbench, geneval, got draw"),
        (["geneval", "x.txt", "--out", "out", "--features", "y"], "give --true, too"),
        (["geneval", "x.txt"], "--out"),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Run, arguments: list[str], words: str) -> None:
    code, out, err = run("prompts", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err
