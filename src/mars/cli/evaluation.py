"""`mars eval`: figures, and whether figures of before still hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mars.cli.options import Candidates, Debug, Guidance, Model, Temperature, TopK, TopP, open_pipeline, say
from mars.errors import DataError, RequestError

if TYPE_CHECKING:
    from mars.evaluation.config import EvaluationConfig


def evaluate(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, such as configs/eval-mini.toml; default: emoji retrieval.")
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="A report.json: measure the same again, and compare.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Replace a value, as section.key=value.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="The picture shard with the true pictures.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report and the pictures go.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts per language, of trained names.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of prompts, and of the pictures.")] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    candidates: Candidates = None,
    model: Model = None,
    precision: Annotated[str | None, typer.Option(help="Of the weights in memory: fp32, fp16, int8 or int4.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how well pictures fit their prompts, English and Chinese; figures can be replayed."""
    asked: dict[str, Any] = {
        "out": out, "seed": seed, "model": model, "precision": precision, "emoji.pictures": pictures,
        "emoji.prompts": prompts, "sampling.guidance": guidance, "sampling.temperature": temperature,
        "sampling.top_k": top_k, "sampling.top_p": top_p, "sampling.candidates": candidates,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    if replay is not None:
        if config is not None or overrides or given.keys() - {"out", "model"}:
            raise RequestError("a replay takes all from the report but --out and --model; leave the others away")
        _replay(replay, out=out, model=model)
        return
    from mars.evaluation import benchmarks

    chosen = _config(config, [*(overrides or []), *(f"{name}={_toml(value)}" for name, value in given.items())])
    pipe = open_pipeline(chosen.model, precision=chosen.precision)
    typer.echo(json.dumps(benchmarks.evaluate(pipe, chosen, say=say), ensure_ascii=False, indent=2))


def _config(file: Path | None, overrides: list[str]) -> "EvaluationConfig":
    from mars.config import from_overrides, load_config
    from mars.evaluation.config import EmojiBench, EvaluationConfig
    from mars.pipeline.orders import DEFAULT_SAMPLING

    if file is not None:
        return load_config(EvaluationConfig, file, overrides)
    base = [f"sampling.{name}={value}" for name, value in asdict(DEFAULT_SAMPLING).items()]
    return from_overrides(EvaluationConfig, [f"emoji.prompts={EmojiBench().prompts}", *base, *overrides])


def _toml(value: object) -> str:
    return json.dumps(str(value)) if isinstance(value, str | Path) else str(value)


def _replay(report: Path, *, out: Path | None, model: str | None) -> None:
    from mars.evaluation.benchmarks import config_of, replay

    config = config_of(report)
    folder = out or report.parent / "replay"
    if folder.resolve() == report.parent.resolve():
        raise RequestError(
            f"a replay must not replace the report that it is compared with; name another --out than {out}"
        )
    pipe = open_pipeline(model or config.model, precision=config.precision)
    _, differences = replay(pipe, report, out=folder, say=say)
    typer.echo(json.dumps({"same": not differences, "differences": differences}, ensure_ascii=False, indent=2))
    if differences:
        raise DataError(f"{len(differences)} figures are not what {report} says; compare it with {folder}")
