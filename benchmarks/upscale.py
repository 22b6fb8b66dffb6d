"""How well super-resolution with the next K codes draws what a small picture leaves out, beside bicubic enlargement.

    python benchmarks/upscale.py MODEL... --pictures SHARD [--count 64] [--timed 5] [--out out/upscale]

Each MODEL is a folder that `mars train` made in stage upscale; all share one image tokenizer and one pair of sizes.
Held-out pictures are fitted to the larger size, which is the truth, and to the smaller one, whose codes are all that a
model sees. Rows of the table:

    bicubic of the small picture   enlarges pixels that no model sees
    bicubic of the small codes     enlarges what the small codes look like: what a model knows
    the same, as codes             that, through the image tokenizer: what a model starts from (`--deviation`)
    K = ...                        the model, likeliest codes unless told otherwise
    true codes                     the image tokenizer's own codes of the truth: the most that a model can reach

Steps and seconds are those of one picture alone, prompt and pixels included. The perceptual distance is that of the
image tokenizer's training: VGG16 features as in `image_tokenizer/losses.py`, summed over three blocks.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mars.checkpoint import codes_digest
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError
from mars.evaluation.metrics import interval, resample
from mars.generation.sampling import Sampling
from mars.image_tokenizer.losses import PerceptualDistance
from mars.image_tokenizer.metrics import psnr
from mars.picture import on_white_page
from mars.pipeline import MarsPipeline
from mars.pipeline.upscaling import UPSCALE_DEVIATION, UPSCALE_SAMPLING, find_upscaling

BATCH = 16
"""Pictures that are upscaled at once where time is not measured."""
SHOWN = 8
"""Rows of the sheet of pictures."""


def choose(shard: Path, *, split: str, count: int, seed: int) -> list[Picture]:
    """Pictures of a split, some of all of them."""
    found = [picture for picture in read_pictures(shard) if picture.record.split == split]
    if not found:
        raise DataError(f"{shard} holds no picture of the split {split}; name another with --split")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[index] for index in order]


def prompt_of(picture: Picture) -> str:
    """The English caption that says most of a picture."""
    captions = {caption.kind: caption.text for caption in picture.record.captions if caption.language == "en"}
    return next((captions[kind] for kind in ("style", "scene", "name") if kind in captions), "")


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, height, width) in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


class Judge:
    """Compares pictures with the truth."""

    def __init__(self, truth: Sequence[Image.Image]) -> None:
        self.truth = to_tensor(truth)
        self.distance = PerceptualDistance()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Means with 95 % bootstrap intervals."""
        found = to_tensor(images)
        each = {
            "psnr": psnr(found, self.truth).double().numpy(),
            "perceptual": np.array(
                [float(self.distance(one[None], true[None])) for one, true in zip(found, self.truth, strict=True)]
            ),
        }
        table: dict[str, Any] = {}
        for name, values in each.items():
            table[name] = float(values.mean())
            table[f"{name}_interval"] = interval(resample([values], seed=0)[0])
        return table


def seconds_each(work: Callable[[int], object], count: int) -> float:
    """Median time of calls, after one that is not counted."""
    work(0)
    times = []
    for index in range(count):
        started = time.perf_counter()
        work(index)
        times.append(time.perf_counter() - started)
    return median(times)


def sheet(columns: dict[str, Sequence[Image.Image]], *, size: tuple[int, int]) -> Image.Image:
    """Pictures beside each other, a row each, under the names of the columns."""
    rows = min(SHOWN, len(next(iter(columns.values()))))
    page = Image.new("RGB", (size[0] * len(columns), size[1] * rows + 16), "white")
    for place, (name, images) in enumerate(columns.items()):
        ImageDraw.Draw(page).text((place * size[0] + 4, 2), name, fill="black")
        for row in range(rows):
            page.paste(images[row].resize(size, Image.Resampling.BICUBIC), (place * size[0], row * size[1] + 16))
    return page


def sampling_of(given: argparse.Namespace) -> Sampling:
    """How codes are chosen."""
    return Sampling(temperature=given.temperature, guidance=given.guidance)


def enlarged(
    pipe: MarsPipeline, small: Sequence[Image.Image], codes: Tensor, *, size: tuple[int, int]
) -> dict[str, Sequence[Image.Image]]:
    """Bicubic enlargements."""

    def larger(images: Sequence[Image.Image]) -> list[Image.Image]:
        return [one.resize(size, Image.Resampling.BICUBIC) for one in images]

    return {
        "small": small,
        "bicubic of the small picture": larger(small),
        "bicubic of the small codes": larger(pipe.decode(codes)),
    }


@dataclass(frozen=True, kw_only=True)
class Larger:
    """What a model made of small codes."""

    images: list[Image.Image]
    codes: Tensor
    seconds: float
    """For one picture alone."""
    codes_per_step: int


def draw_larger(pipe: MarsPipeline, codes: Tensor, prompts: list[str], *, given: argparse.Namespace) -> Larger:
    """All pictures, and how long one takes."""
    sampling, deviation = sampling_of(given), given.deviation or None
    images: list[Image.Image] = []
    found: list[Tensor] = []
    for start in range(0, len(codes), BATCH):
        part = slice(start, start + BATCH)
        seeds = [given.seed + number for number in range(len(codes))[part]]
        drawn = pipe.upscale(codes[part], prompt=prompts[part], seed=seeds, sampling=sampling, deviation=deviation)
        images += drawn.images
        found.append(drawn.codes)

    def one(index: int) -> object:
        return pipe.upscale(
            codes[index : index + 1], prompt=prompts[index], seed=0, sampling=sampling, deviation=deviation
        )

    return Larger(
        images=images,
        codes=torch.cat(found),
        seconds=seconds_each(one, given.timed),
        codes_per_step=find_upscaling(pipe.model.info).codes_per_step,
    )


@torch.inference_mode()
def measure(pipes: Sequence[MarsPipeline], pictures: Sequence[Picture], given: argparse.Namespace) -> dict[str, Any]:
    """All figures; the sheet of pictures goes into the folder."""
    first, how = pipes[0], find_upscaling(pipes[0].model.info)
    codec, factor = first.model.image_tokenizer, first.model.image_tokenizer.config.factor
    low = first.model.info.grids[0]
    high = how.high(low)
    for pipe in pipes[1:]:
        same = pipe.model.info.grids[0] == low and find_upscaling(pipe.model.info).high(low) == high
        if not same or codes_digest(pipe.model.image_tokenizer) != codes_digest(codec):
            raise DataError(f"{pipe.model.folder} has another image tokenizer or other sizes; compare it alone")
    low_size, high_size = ((grid[1] * factor, grid[0] * factor) for grid in (low, high))
    whole = [Image.fromarray(picture.pixels()) for picture in pictures]
    truth, small = ([on_white_page(one, size=size) for one in whole] for size in (high_size, low_size))
    prompts = [prompt_of(picture) for picture in pictures]
    low_codes, high_codes = codec.encode(to_tensor(small)), codec.encode(to_tensor(truth))
    judge = Judge(truth)
    columns = enlarged(first, small, low_codes, size=high_size)
    as_codes = codec.encode(to_tensor(columns["bicubic of the small codes"]))
    columns["the same, as codes"] = first.decode(as_codes)
    bicubic = seconds_each(
        lambda index: enlarged(first, small[:1], low_codes[index : index + 1], size=high_size), given.timed
    )
    rows: dict[str, dict[str, Any]] = {
        name: judge(images) | {"seconds": bicubic} for name, images in columns.items() if name != "small"
    }
    rows["the same, as codes"]["codes_right"] = float((as_codes == high_codes).double().mean())
    for pipe in pipes:
        drawn = draw_larger(pipe, low_codes, prompts, given=given)
        name = f"{pipe.model.info.name}, K = {drawn.codes_per_step}"
        columns[name] = drawn.images
        rows[name] = judge(drawn.images) | {
            "codes_per_step": drawn.codes_per_step,
            "steps": high[0] * high[1] // drawn.codes_per_step,
            "seconds": drawn.seconds,
            "codes_right": float((drawn.codes == high_codes).double().mean()),
            "visual_digest": pipe.model.visual_digest,
        }
    columns["true codes"] = first.decode(high_codes)
    rows["true codes"] = judge(columns["true codes"])
    columns["truth"] = truth
    given.out.mkdir(parents=True, exist_ok=True)
    sheet(columns, size=high_size).save(given.out / "pictures.png")
    return {
        "pictures": len(pictures),
        "split": given.split,
        "sizes": [list(low_size), list(high_size)],
        "sampling": asdict(sampling_of(given)),
        "deviation": given.deviation or None,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{found['pictures']} held-out pictures ({found['split']}), "
        + " to ".join(f"{width}x{height}" for width, height in found["sizes"])
        + f"; temperature {found['sampling']['temperature']}, guidance {found['sampling']['guidance']}, deviation "
        f"{found['deviation']}.",
        "",
        "| | steps | seconds a picture | PSNR, dB (95 %) | perceptual distance (95 %) | codes as the true ones |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["rows"].items():
        quality = [
            f"{row[key]:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"
            for key, digits in (("psnr", 2), ("perceptual", 3))
            for low, high in [row[f"{key}_interval"]]
        ]
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else "-"
        right = f"{row['codes_right']:.1%}" if "codes_right" in row else "-"
        lines.append(f"| {name} | {row.get('steps', '-')} | {seconds} | {' | '.join(quality)} | {right} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and writes it with `results.json` and `pictures.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, required=True, help="a picture shard of at least the larger size")
    parser.add_argument("--split", default="picture", help="which pictures: of the emoji, picture or concept")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--timed", type=int, default=5, help="pictures whose time is taken, one by one")
    parser.add_argument("--temperature", type=float, default=UPSCALE_SAMPLING.temperature)
    parser.add_argument("--guidance", type=float, default=UPSCALE_SAMPLING.guidance)
    parser.add_argument("--deviation", type=float, default=UPSCALE_DEVIATION, help="0 is the model alone")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures, and of sampling")
    parser.add_argument("--out", type=Path, default=Path("out/upscale"))
    given = parser.parse_args()
    pictures = choose(given.pictures, split=given.split, count=given.count, seed=given.seed)
    given.timed = min(given.timed, len(pictures))
    found = measure([MarsPipeline.from_pretrained(folder) for folder in given.models], pictures, given)
    text = markdown(found)
    print(text)  # noqa: T201
    (given.out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (given.out / "results.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
