"""`mars edit`: part of a picture drawn anew."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import (
    Debug,
    Guidance,
    GuidanceStop,
    Json,
    Model,
    Precision,
    Scorer,
    Temperature,
    TopK,
    TopP,
    Window,
    open_pipeline,
    sampling_of,
)
from mars.cli.progress import bar


def edit(
    picture: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    prompt: Annotated[str, typer.Argument(help="What the whole picture is to show.")] = "",
    mask: Annotated[
        Path | None,
        typer.Option(help="As large as the picture, white (or transparent) where it is drawn anew."),
    ] = None,
    margins: Annotated[
        str | None, typer.Option(help="Pixels to draw around it: one number, or left,above,right,below.")
    ] = None,
    vary: Annotated[float | None, typer.Option(help="Draw this share (0 to 1) of the picture anew.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture file, or a folder.")] = Path("mars.png"),
    n: Annotated[int, typer.Option(help="How many.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same picture.")] = None,
    negative: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    guidance: Guidance = None,
    guidance_stop: GuidanceStop = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    candidates: Annotated[
        int | None, typer.Option(help="Draw so many and keep the one that goes best with the rest.")
    ] = None,
    scorer: Scorer = "likelihood",
    window: Window = None,
    model: Model = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw part of a picture anew: where a mask is white, around it, or a share of it."""
    from mars.cli.drawing import save, targets
    from mars.picture import open_picture
    from mars.pipeline.editing import read_margins
    from mars.pipeline.scoring import find_scorer

    sampling = sampling_of(
        guidance=guidance, guidance_stop=guidance_stop, temperature=temperature, top_k=top_k, top_p=top_p,
        candidates=candidates, window=window,
    )  # fmt: skip
    files = list(targets(out, n))
    opened = open_picture(picture)
    around = None if margins is None else read_margins(margins)
    pipe = open_pipeline(model, precision=precision)
    with bar("drawing") as progress:
        drawn = pipe.edit(
            opened, prompt, mask=mask, margins=around, vary=vary, n=n, seed=seed, negative_prompt=negative,
            sampling=sampling, scorer=find_scorer(pipe, scorer), progress=progress,
        )  # fmt: skip
    save(drawn, files)
    if as_json:
        pictures = [{"file": str(file), "seed": number} for file, number in zip(files, drawn.seeds, strict=True)]
        typer.echo(json.dumps({"pictures": pictures, "seconds": drawn.seconds}, ensure_ascii=False))
    else:
        for file, number in zip(files, drawn.seeds, strict=True):
            typer.echo(f"{file}  (seed {number})")
