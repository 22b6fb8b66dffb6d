"""`mars data ...`: picture sets, and their codes."""

from pathlib import Path
from typing import Annotated

import typer

from mars.cli.edits import edits
from mars.cli.options import Debug
from mars.cli.progress import bar

data_app = typer.Typer(help="Make and encode picture sets.", no_args_is_help=True)
data_app.command()(edits)


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="The picture shard to write.")] = Path("data/emoji.tar"),
    cache: Annotated[Path, typer.Option(help="Where npm packages are kept.")] = Path("data/npm"),
    size: Annotated[int, typer.Option(help="Pixels on each side.", min=16)] = 128,
    debug: Debug = False,
) -> None:
    """Render emoji artwork with English and Chinese captions (needs npm)."""
    from mars.data.emoji import make_emoji
    from mars.data.shards import write_pictures

    typer.echo(f"{out}: {write_pictures(out, make_emoji(cache=cache, size=size)):,} pictures")


@data_app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="The picture shard to write.")] = Path("data/scenes.tar"),
    count: Annotated[int, typer.Option(help="Pictures to draw.", min=1)] = 1500,
    seed: int = 0,
    size: Annotated[int, typer.Option(help="Pixels on each side.", min=64)] = 128,
    debug: Debug = False,
) -> None:
    """Draw captioned scenes of shapes, colours, counts and places."""
    from mars.data.scenes import make_scenes
    from mars.data.shards import write_pictures

    typer.echo(f"{out}: {write_pictures(out, make_scenes(count=count, seed=seed, size=size)):,} pictures")


@data_app.command()
def encode(
    pictures: Annotated[Path, typer.Argument(help="A picture shard.")],
    image_tokenizer: Annotated[Path, typer.Option(help="A folder with an image tokenizer.")],
    out: Annotated[Path, typer.Option(help="The code shard to write.")],
    debug: Debug = False,
) -> None:
    """Turn pictures into codes, which is what training reads."""
    from mars.checkpoint import codes_digest, load_image_tokenizer
    from mars.data.encode import encode_pictures

    tokenizer, _ = load_image_tokenizer(image_tokenizer)
    digest = codes_digest(tokenizer)
    with bar("encoding") as progress:
        count = encode_pictures(pictures, tokenizer=tokenizer, digest=digest, out=out, progress=progress)
    typer.echo(f"{out}: {count:,} pictures")
