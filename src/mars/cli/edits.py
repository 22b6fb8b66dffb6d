"""`mars data edits`: editing triples as codes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mars.cli.options import Debug

if TYPE_CHECKING:
    import numpy as np


def edits(
    image_tokenizer: Annotated[Path, typer.Option(help="A folder with an image tokenizer.")],
    out: Annotated[Path, typer.Option(help="The file of documents to write.")] = Path("data/edits.parquet"),
    count: Annotated[int, typer.Option(help="Edits to make.", min=1)] = 1500,
    seed: int = 0,
    size: Annotated[int, typer.Option(help="Pixels on each side.", min=64)] = 128,
    debug: Debug = False,
) -> None:
    """Make scenes, instructions such as "make it blue", and what they ask for, as codes."""
    import numpy as np
    import torch

    from mars.checkpoint import codes_digest, load_image_tokenizer
    from mars.data.documents import write_documents
    from mars.data.edits import make_edits

    tokenizer, _ = load_image_tokenizer(image_tokenizer)

    @torch.inference_mode()
    def codes(pixels: "np.ndarray") -> "np.ndarray":
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return tokenizer.encode(images).numpy().astype(np.int32)

    made = make_edits(count=count, seed=seed, size=size, encode=codes)
    written = write_documents(out, made, tokenizer=codes_digest(tokenizer))
    typer.echo(f"{out}: {written:,} edits")
