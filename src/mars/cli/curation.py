"""`mars data curate` and `mars data recaption`: choosing pictures, and describing them anew."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mars.cli.options import Debug, open_pipeline
from mars.cli.progress import bar

if TYPE_CHECKING:
    from mars.data.recaption import Captioner


def curate(
    pictures: Annotated[Path, typer.Argument(help="A folder of picture shards, or one.")],
    out: Annotated[Path, typer.Option(help="The folder to write what stays to.")],
    config: Annotated[Path | None, typer.Option(help="A TOML file; without one, the default rules.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Replace a value, as section.key=value.")] = None,
    debug: Debug = False,
) -> None:
    """Keep the pictures that pass rules, and report what was dropped and why."""
    from mars.config import from_overrides, load_config
    from mars.data.curation.config import CurationConfig
    from mars.data.curation.curate import curate as run

    changes = overrides or ()
    rules = load_config(CurationConfig, config, changes) if config else from_overrides(CurationConfig, changes)
    with bar("judging") as progress:
        report = run(pictures, out=out, config=rules, progress=progress)
    dropped = ", ".join(f"{rule} {count:,}" for rule, count in report["dropped"].items())
    typer.echo(f"{out}: kept {report['kept']:,} of {report['pictures']:,} pictures; dropped: {dropped or 'none'}")
    typer.echo(f"see {out / 'report.html'}")


def recaption(
    pictures: Annotated[Path, typer.Argument(help="A folder of picture shards, or one.")],
    out: Annotated[Path, typer.Option(help="The folder to write all pictures to, with the new captions.")],
    endpoint: Annotated[
        str | None, typer.Option(help="A server's URL up to /v1; default: MARS's own captioner.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name at the endpoint, or a MARS model's folder or hub id.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="en or zh; can be repeated. Default: both.")] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable with the key.")] = "OPENAI_API_KEY",
    at_once: Annotated[int, typer.Option(help="Requests under way at the same time.", min=1)] = 8,
    per_minute: Annotated[float, typer.Option(help="Requests begun in a minute.", min=0.01)] = 600,
    side: Annotated[int, typer.Option(help="Pixels of the longer side of what is sent.", min=16)] = 768,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", min=0.01)] = 60,
    tries: Annotated[int, typer.Option(help="Requests for one answer.", min=1)] = 6,
    cache: Annotated[Path | None, typer.Option(help="The file that remembers answers.")] = None,
    debug: Debug = False,
) -> None:
    """Describe pictures anew, in English and Chinese, by any OpenAI-compatible endpoint or by MARS itself."""
    from mars.data.recaption import recaption as run
    from mars.errors import RequestError
    from mars.files import cache_folder

    captioner: Captioner
    if endpoint is None:
        captioner = _own_captioner(model)
    else:
        from mars.data.endpoint import Endpoint

        if model is None:
            raise RequestError("--endpoint needs --model, the name of the model there")
        captioner = Endpoint(
            endpoint,
            model=model,
            key=os.environ.get(key_variable),
            at_once=at_once,
            per_minute=per_minute,
            side=side,
            timeout=timeout,
            tries=tries,
        )
    remembered = cache or cache_folder() / "captions.sqlite"
    with bar("describing") as progress:
        done = run(
            pictures,
            out=out,
            captioner=captioner,
            languages=language or ["en", "zh"],
            cache=remembered,
            progress=progress,
        )
    typer.echo(
        f"{out}: {done.pictures:,} pictures, {done.asked:,} new captions and {done.remembered:,} remembered ones"
    )
    if done.failed:
        typer.echo(f"{done.failed:,} captions could not be made: see {out / 'quarantine.jsonl'}")


def _own_captioner(model: str | None) -> "Captioner":
    """A MARS model, asked about one picture at a time."""
    import asyncio
    import io

    from PIL import Image

    from mars.data.recaption import UnusableAnswer
    from mars.data.shards import Picture
    from mars.sequence.text import CAPTION_HINTS

    pipe = open_pipeline(model)

    class Own:
        name = f"{pipe.model.info.name} {pipe.model.visual_digest}"
        prompts = CAPTION_HINTS
        answers = 1  # it always says the same
        at_once = 1

        async def caption(self, picture: Picture, *, language: str, attempt: int) -> str:  # noqa: ARG002
            try:
                image = Image.open(io.BytesIO(picture.content))
                return await asyncio.to_thread(pipe.caption, image, language=language)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise UnusableAnswer(f"the picture is damaged: {error}") from None

        async def close(self) -> None:
            """There is nothing to end."""

    return Own()
