"""`mars upscale`: a picture drawn again in more detail."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import (
    Debug,
    Guidance,
    Json,
    Model,
    Precision,
    Temperature,
    TopK,
    TopP,
    open_pipeline,
    sampling_of,
)
from mars.cli.progress import bar


def upscale(
    picture: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    prompt: Annotated[str, typer.Option(help="What the picture shows; it helps.")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture file, or a folder.")] = Path("mars.png"),
    seed: Annotated[int | None, typer.Option(help="With a temperature: the same seed draws the same picture.")] = None,
    deviation: Annotated[
        float | None,
        typer.Option(help="How far from a bicubic enlargement, the codebook's own being 1; 0 is any.", min=0),
    ] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a picture again in more detail, with a model that was trained to."""
    from mars.cli.drawing import save, targets
    from mars.picture import open_picture
    from mars.pipeline.upscaling import UPSCALE_DEVIATION, UPSCALE_SAMPLING, find_upscaling

    sampling = sampling_of(
        UPSCALE_SAMPLING, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, candidates=None
    )
    files = list(targets(out, 1))
    opened = open_picture(picture)
    pipe = open_pipeline(model, precision=precision)
    find_upscaling(pipe.model.info)
    allowed = UPSCALE_DEVIATION if deviation is None else deviation or None
    with bar("upscaling") as progress:
        drawn = pipe.upscale(opened, prompt=prompt, seed=seed, sampling=sampling, deviation=allowed, progress=progress)
    save(drawn, files)
    if as_json:
        pictures = [{"file": str(files[0]), "prompt": prompt, "seed": drawn.seeds[0]}]
        typer.echo(json.dumps({"pictures": pictures, "seconds": drawn.seconds}, ensure_ascii=False))
    else:
        typer.echo(f"{files[0]}  (seed {drawn.seeds[0]})")
