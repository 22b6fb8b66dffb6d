"""`mars write`: text and pictures in turns."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import Debug, Guidance, Json, Model, Precision, Temperature, open_pipeline, sampling_of


def write(
    text: Annotated[list[str], typer.Argument(help="What to go on from.")],
    picture: Annotated[Path | None, typer.Option(help="A picture that is shown after the text.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for pictures.")] = Path("written"),
    max_tokens: Annotated[int, typer.Option(help="Longest text.", min=1)] = 128,
    max_images: Annotated[int, typer.Option(help="Most pictures.", min=0)] = 4,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same document.")] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    model: Model = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let the model write and paint in turns, as it wants to."""
    from mars.errors import RequestError
    from mars.files import whole_file
    from mars.pipeline.writing import Painted, Said, Words

    parts: list[Said] = [" ".join(text), *([] if picture is None else [picture])]
    drawing = sampling_of(guidance=guidance, temperature=temperature, top_k=None, top_p=None, candidates=None)
    pipe = open_pipeline(model, precision=precision)
    told: list[dict[str, str]] = []
    for piece in pipe.write(parts, max_tokens=max_tokens, max_images=max_images, seed=seed, drawing=drawing):
        if isinstance(piece, Words):
            if told and "text" in told[-1]:
                told[-1]["text"] += piece.text
            else:
                told.append({"text": piece.text})
            if not as_json:
                typer.echo(piece.text, nl=False)
        elif isinstance(piece, Painted):
            file = out / f"{sum('file' in one for one in told):04d}.png"
            with whole_file(file, error=RequestError) as partial:
                piece.image.save(partial, format="PNG")
            told.append({"file": str(file)})
            if not as_json:
                typer.echo(f"[{file}]", nl=False)
    typer.echo(json.dumps({"parts": told}, ensure_ascii=False) if as_json else "")
