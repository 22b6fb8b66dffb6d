"""`mars bench`: how fast a model draws on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import Candidates, Debug, Guidance, Model, Precision, open_pipeline, sampling_of, say


def bench(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where speed.json and speed.png go.")] = Path("out/bench"),
    batches: Annotated[str, typer.Option(help="How many pictures at a time, with commas in between.")] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(help="How often; medians are told.", min=1)] = 5,
    guidance: Guidance = None,
    candidates: Candidates = None,
    model: Model = None,
    precision: Precision = "fp16",
    debug: Debug = False,
) -> None:
    """Measure how fast a model draws here, beside what the machine's memory allows."""
    from mars.errors import RequestError
    from mars.evaluation.speed import speed_benchmark

    counts = [part.strip() for part in batches.split(",")]
    if not all(part.isdecimal() and int(part) for part in counts):
        raise RequestError(f"--batches must be numbers from 1 on, with commas in between, got {batches!r}")
    sampling = sampling_of(guidance=guidance, temperature=None, top_k=None, top_p=None, candidates=candidates)
    pipe = open_pipeline(model, precision=precision)
    found = speed_benchmark(
        pipe, out=out, batches=[int(part) for part in counts], repeats=repeats, sampling=sampling, say=say
    )
    typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
