"""`mars convert ...`: weights of other projects, as ours."""

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

    from mars.checkpoint import atomic_folder, save_image_tokenizer
    from mars.image_tokenizer.convert import convert_image_tokenizer

    tokenizer = convert_image_tokenizer(source, family=family)
    with atomic_folder(out) as folder:
        save_image_tokenizer(folder, tokenizer, dtype=torch.float16 if half else torch.float32)
    config = tokenizer.config
    low, high = config.pixel_range
    say(f"{config.num_codes:,} codes by {config.code_choice}, {config.factor} pixels each, pixels {low:g}..{high:g}")
    typer.echo(out)
