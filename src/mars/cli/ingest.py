"""`mars data ingest`: pictures and captions from where people keep them, to shards."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mars.cli.options import Debug
from mars.cli.progress import bar

if TYPE_CHECKING:
    from mars.data.ingestion.ingest import IngestReport


def ingest(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of pictures with .txt, .json, .caption or metadata.csv beside them; JSONL, CSV, TSV or "
            "Parquet; WebDataset tars; folders of these; data sets that `datasets` saved."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of shards to write, or to continue.")],
    caption: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN[:LANGUAGE[:KIND]] of captions, as text_zh:zh:translated; txt is the text beside. A source is "
            "read for those that it has."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="ROLE=NAME of a column: image, url, licence, source, concept, style or split."),
    ] = None,
    score: Annotated[list[str] | None, typer.Option(help="A column of scores to keep.")] = None,
    source: Annotated[str | None, typer.Option(help="Where pictures are from that do not say so.")] = None,
    licence: Annotated[str, typer.Option(help="Of pictures that do not say so.")] = "unknown",
    workers: Annotated[int, typer.Option(help="Processes; default: one per core; 0: this one.", min=-1)] = -1,
    shard_pictures: Annotated[int, typer.Option(help="At most this many in a shard.", min=1)] = 10_000,
    shard_megabytes: Annotated[int, typer.Option(help="About this much in a shard.", min=1)] = 256,
    debug: Debug = False,
) -> None:
    """Bring pictures and captions into shards; what cannot be used is listed with the reason."""
    from mars.data.ingestion.ingest import ingest as ingest_sources
    from mars.data.ingestion.records import CaptionColumn, Columns
    from mars.errors import RequestError

    roles = {}
    for text in column or []:
        role, equals, name = text.partition("=")
        if not (role and equals and name):
            raise RequestError(f"--column must be ROLE=NAME, as image=photo, got {text!r}")
        roles[role] = name
    columns = Columns(
        captions=tuple(map(CaptionColumn.parse, caption or [])),
        roles=roles,
        scores=tuple(score or []),
        source=source,
        licence=licence,
    )
    with bar("ingesting") as progress:
        report = ingest_sources(
            sources,
            out=out,
            columns=columns,
            workers=(os.cpu_count() or 1) if workers < 0 else workers,
            max_pictures=shard_pictures,
            max_bytes=shard_megabytes << 20,
            progress=progress,
        )
    _tell(report, out)


def _tell(report: "IngestReport", out: Path) -> None:
    typer.echo(f"{out}: {report.pictures:,} pictures in {report.shards:,} shards")
    for name, lacking in report.lacks.items():
        typer.echo(f"  no column {' and no '.join(lacking)} in {name}; its captions are the others that were named")
    if report.without_caption:
        typer.echo(f"  without a caption: {report.without_caption:,}")
    if report.refused:
        typer.echo(f"  refused: {sum(report.refused.values()):,}, listed in {out / 'quarantine.jsonl'}")
    for reason, count in report.refused.items():
        typer.echo(f"    {count:,} {reason}")
