"""`mars data ...`: picture sets, and their codes."""

from pathlib import Path
from typing import Annotated, cast

import typer

from mars.cli.curation import curate, recaption
from mars.cli.edits import edits
from mars.cli.ingest import ingest
from mars.cli.options import Debug
from mars.cli.progress import bar

data_app = typer.Typer(help="Make and encode picture sets.", no_args_is_help=True)
data_app.command()(ingest)
data_app.command()(curate)
data_app.command()(recaption)
data_app.command()(edits)


@data_app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="The picture shard to write.")] = Path("data/emoji.tar"),
    cache: Annotated[Path, typer.Option(help="Where npm packages are kept.")] = Path("data/npm"),
    size: Annotated[int, typer.Option(help="Pixels on each side.", min=16)] = 128,
    style: Annotated[
        list[str] | None, typer.Option(help="One of the styles; may be given again. Default: all.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Concepts, at random but always the same. Default: all.", min=1)
    ] = None,
    debug: Debug = False,
) -> None:
    """Render emoji artwork with English and Chinese captions (needs npm)."""
    from mars.data.emoji import SETS, make_emoji
    from mars.data.shards import write_pictures
    from mars.errors import RequestError

    for name in style or ():
        if name not in SETS:
            raise RequestError(f"style must be one of {', '.join(SETS)}, got {name}")
    refused: list[str] = []
    made = make_emoji(
        cache=cache, size=size, styles=tuple(style or SETS), count=count,
        refused=lambda key, reason: refused.append(f"{key}: {reason}"),
    )  # fmt: skip
    typer.echo(f"{out}: {write_pictures(out, made):,} pictures")
    if refused:
        typer.echo(f"  refused: {len(refused):,}")
    for line in refused:
        typer.echo(f"    {line}")


@data_app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="The picture shard to write.")] = Path("data/scenes.tar"),
    count: Annotated[int, typer.Option(help="Pictures to draw.", min=1)] = 1500,
    seed: int = 0,
    size: Annotated[int, typer.Option(help="Pixels on each side.", min=64)] = 128,
    spacing: Annotated[int, typer.Option(help="Things stand on every place of 16 (1) or every second (2).")] = 1,
    rich: Annotated[
        bool, typer.Option(help="Half with more shapes, half with more colours, which no bench asks for.")
    ] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="single, count, pair or line; may be given again, twice for twice as many. Default: all."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw captioned scenes of shapes, colours, counts and places."""
    from mars.data.scene_words import Kind
    from mars.data.scenes import KINDS, make_scenes
    from mars.data.shards import write_pictures

    made = make_scenes(
        count=count, seed=seed, size=size, spacing=spacing, rich=rich, kinds=cast(list[Kind], kind) or KINDS
    )
    typer.echo(f"{out}: {write_pictures(out, made):,} pictures")


@data_app.command()
def encode(
    pictures: Annotated[Path, typer.Argument(help="A picture shard, or a folder of them.")],
    image_tokenizer: Annotated[Path, typer.Option(help="A folder with an image tokenizer.")],
    out: Annotated[Path, typer.Option(help="The folder of code shards to write or continue, or one FILE.parquet.")],
    size: Annotated[
        list[int] | None, typer.Option(help="Pixels on each side; may be given again. Default: as pictures are.")
    ] = None,
    crop: Annotated[str, typer.Option(help="What does not fit: center, random, or none (a white page).")] = "center",
    aspect_buckets: Annotated[bool, typer.Option(help="As many pixels, but in the shape nearest a picture's.")] = False,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster (RAY_ADDRESS).")] = "local",
    workers: Annotated[int | None, typer.Option(help="Processes of one thread; default: one per core.", min=1)] = None,
    debug: Debug = False,
) -> None:
    """Turn pictures into codes, which is what training reads."""
    import os

    from mars.checkpoint import codes_digest, load_image_tokenizer
    from mars.data.code_folder import encode_folder, local_engine
    from mars.data.crops import Sizes
    from mars.data.encode import Encoder, encode_pictures
    from mars.data.ray_engine import ray_engine
    from mars.errors import RequestError

    engines = {"local": local_engine, "ray": ray_engine}
    if engine not in engines:
        raise RequestError(f"engine must be {' or '.join(engines)}, got {engine}")
    tokenizer, _ = load_image_tokenizer(image_tokenizer)
    digest, factor = codes_digest(tokenizer), tokenizer.config.factor
    sizes = Sizes(factor=factor, sizes=tuple(size or ()), crop=crop, aspect_buckets=aspect_buckets)  # type: ignore[arg-type]
    with bar("encoding") as progress:
        if out.suffix == ".parquet":
            if engine != "local" or workers is not None:
                raise RequestError(f"one file is written by one process, got {out}; name a folder")
            count = encode_pictures(
                pictures, tokenizer=tokenizer, digest=digest, out=out, sizes=sizes, progress=progress
            )
            refused = 0
        else:
            encoder = Encoder(load=load_image_tokenizer, folder=image_tokenizer.resolve(), digest=digest, sizes=sizes)
            chosen = engines[engine](workers=workers or os.cpu_count() or 1)
            found = encode_folder(pictures, encoder=encoder, out=out, engine=chosen, progress=progress)
            count, refused = found.pictures, found.refused
    typer.echo(f"{out}: {count:,} pictures")
    if refused:
        typer.echo(f"  refused: {refused:,}, listed in {out / 'quarantine.jsonl'}")
