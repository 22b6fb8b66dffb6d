"""`mars prompts`: the pictures that MS-COCO, T2I-CompBench or GenEval ask for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mars.cli.options import (
    Candidates,
    Debug,
    Guidance,
    Model,
    Precision,
    Temperature,
    TopK,
    TopP,
    open_pipeline,
    sampling_of,
)
from mars.cli.progress import bar
from mars.errors import RequestError


def prompts(
    bench: Annotated[str, typer.Argument(help="coco, t2i-compbench or geneval.")],
    file: Annotated[Path, typer.Argument(help="Its own prompt file.")],
    out: Annotated[Path, typer.Option(help="The folder that its scorer reads; the same command continues.")],
    n: Annotated[int | None, typer.Option(help="Pictures per prompt; default: as is usual there.", min=1)] = None,
    count: Annotated[int | None, typer.Option(help="Take only so many prompts.", min=1)] = None,
    clip: Annotated[Path | None, typer.Option(help="A CLIP's folder: CLIPScore and R-precision.")] = None,
    true: Annotated[Path | None, typer.Option(help="A folder of true pictures: FID and KID.")] = None,
    features: Annotated[str, typer.Option(help="With --true: a CLIP's folder or a TorchScript file.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first picture; the others count up.")] = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    candidates: Candidates = None,
    model: Model = None,
    precision: Precision = "fp16",
    debug: Debug = False,
) -> None:
    """Draw an official prompt file into the folders that its scorer reads."""
    from mars.evaluation.drawing import Artist
    from mars.evaluation.prompt_sets import READERS, draw_prompt_file, score_prompt_file

    if bench not in READERS:
        raise RequestError(f"the bench must be one of {', '.join(READERS)}, got {bench}")
    if features and true is None:
        raise RequestError("--features names the network of FID and KID; give --true, too")
    asked: dict[str, Any] = {} if n is None else {"n": n}
    wanted = READERS[bench](file, count=count, **asked)
    sampling = sampling_of(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, candidates=candidates)
    artist = Artist(pipe=open_pipeline(model, precision=precision), sampling=sampling, seed=seed)
    with bar("drawing") as progress:
        lines = draw_prompt_file(artist, wanted, out=out, progress=progress)
    report = score_prompt_file(lines, artist=artist, out=out, clip=clip, true=true, features=features or None)
    typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
