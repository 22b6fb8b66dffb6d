"""`mars convert ...` and `mars init`: weights of others as ours, and an untrained model made of them."""

from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import Debug, say

convert_app = typer.Typer(help="Turn weights of other projects into ours.", no_args_is_help=True)


@convert_app.callback()
def convert() -> None:
    """Keeps `image-tokenizer` a command of its own: Typer makes a group of one command that command."""


@convert_app.command(name="image-tokenizer")
def image_tokenizer(
    source: Annotated[Path, typer.Argument(help="A file of weights, or a folder with one and perhaps config.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    family: Annotated[
        str | None,
        typer.Option(
            help="openmuse, amused, diffusers, taming, chameleon, ibq, llamagen or show-o; default: find out."
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store 16 bits a weight.")] = False,
    debug: Debug = False,
) -> None:
    """Turn a VQ-GAN of another project into an image tokenizer of ours."""
    import torch

    from mars.checkpoint import save_image_tokenizer
    from mars.errors import CheckpointError
    from mars.files import atomic_folder, place_for
    from mars.image_tokenizer.convert import convert_image_tokenizer

    place = place_for(out, error=CheckpointError)
    tokenizer = convert_image_tokenizer(source, family=family)
    with atomic_folder(place) as folder:
        save_image_tokenizer(folder, tokenizer, dtype=torch.float16 if half else torch.float32)
    config = tokenizer.config
    low, high = config.pixel_range
    say(f"{config.num_codes:,} codes by {config.code_choice}, {config.factor} pixels each, pixels {low:g}..{high:g}")
    typer.echo(out)


def init(
    llm: Annotated[str, typer.Option(help="A GGUF file, a folder, owner/name on the hub, or package:NAME.")],
    image_tokenizer: Annotated[str, typer.Option(help="A folder of ours or of another project, or owner/name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A SemVIE option, as visual_width=448; see ARCHITECTURE.md.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the LLM on the hub.")] = None,
    size: Annotated[int, typer.Option(help="Pixels on each side of the pictures to train on.", min=1)] = 256,
    name: Annotated[str | None, typer.Option(help="What the model is called; default: the folder's name.")] = None,
    include_language: Annotated[
        bool, typer.Option("--include-language", help="Write the LLM too, so that the folder needs nothing else.")
    ] = False,
    seed: int = 0,
    debug: Debug = False,
) -> None:
    """Make an untrained model out of an LLM and an image tokenizer."""
    from mars.config import from_overrides
    from mars.convert import init_model
    from mars.model.config import SemVIEConfig

    info = init_model(
        out,
        language=llm,
        revision=revision,
        image_tokenizer=image_tokenizer,
        semvie=from_overrides(SemVIEConfig, overrides or []),
        size=size,
        name=name,
        seed=seed,
        include_language=include_language,
        notify=say,
    )
    say(f"{info.name}: a visual expert beside {llm}, to be trained on {size}x{size} pixels")
    typer.echo(out)
