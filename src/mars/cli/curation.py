"""`mars data curate`: choosing pictures."""

from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import Debug
from mars.cli.progress import bar


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
