"""Draws any number of prompts, as many in one call as the pipeline takes, and saves pictures as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mars.cli.progress import Report
from mars.errors import RequestError
from mars.files import whole_file
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.checks import find_grid
from mars.pipeline.orders import MAX_IMAGES, Generated
from mars.pipeline.scoring import Scorer
from mars.pipeline.upscaling import find_upscaling


def targets(out: Path, count: int) -> Iterator[Path]:
    """Files for `count` pictures: `out` itself for one, numbered beside it (or inside it, a folder) for more.

    Raises:
        RequestError: if `out` is no name of a picture.
    """
    if out.is_dir() or not out.suffix:
        return (out / f"{index:04d}.png" for index in range(count))
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise RequestError(f"--out must end in .png, .jpg or .webp, or name a folder, got {out}")
    if count == 1:
        return iter([out])
    return (out.with_stem(f"{out.stem}-{index:04d}") for index in range(count))


def save(drawn: Generated, files: Sequence[Path]) -> None:
    """Writes all pictures, each whole or not at all."""
    for image, file in zip(drawn.images, files, strict=True):
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(file.suffix.lower(), "PNG")
        with whole_file(file, error=RequestError) as partial:
            image.save(partial, format=kind)


def draw_all(
    pipe: MarsPipeline,
    prompts: Sequence[str],
    *,
    n: int,
    seed: int | None,
    size: tuple[int | None, int | None],
    negative: str,
    sampling: Sampling,
    scorer: Scorer | None = None,
    upscale: bool = False,
    progress: Report | None,
) -> Iterator[Generated]:
    """The prompts in their order, some per call; the pictures are those of one call, up to rounding.

    Args:
        size: width and height.
        upscale: draw each picture again in more detail.
        progress: called with the steps of all calls together.

    Raises:
        PromptError: if a prompt is empty or too long, before anything is drawn.
        RequestError: if the size, `n`, the seed or the scorer cannot be used, or the model cannot upscale.
    """
    pipe.check_prompts(prompts)
    factor = pipe.model.image_tokenizer.config.factor
    rows, columns = find_grid(*size, sizes=pipe.sizes, factor=factor)
    low = sampling.candidates * rows * columns
    high = rows * columns * find_upscaling(pipe.model.info).scale ** 2 if upscale else 0
    done = 0

    def report(codes: int, _: int) -> None:
        if progress is not None:
            progress(done + codes, len(prompts) * n * (low + high))

    some = max(1, MAX_IMAGES // max(1, n))
    for start in range(0, len(prompts), some):
        drawn = pipe(
            prompts[start : start + some], n=n, seed=seed, width=size[0], height=size[1], negative_prompt=negative,
            sampling=sampling, scorer=scorer, progress=report,
        )  # fmt: skip
        seed = drawn.seeds[0]  # where it was left to chance, all calls share it
        done += low * len(drawn.images)
        if upscale:
            seconds = drawn.seconds
            drawn = pipe.upscale(drawn, progress=report)
            drawn = replace(drawn, seconds={name: value + seconds[name] for name, value in drawn.seconds.items()})
            done += high * len(drawn.images)
        yield drawn
