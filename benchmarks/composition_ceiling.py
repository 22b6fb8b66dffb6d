"""How much of a scene the image tokenizer keeps: the detector on true pictures and on their reconstructions.

    python benchmarks/composition_ceiling.py [FOLDER] --prompts 100

Prints, for each category of the compositional bench, how often the detector is right about the true picture (at least
99 %, or it is no judge), about the reconstruction (no model that uses the tokenizer can be expected to draw better),
and about the reconstruction from nearest codes, where the tokenizer takes others.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mars.checkpoint import load_image_tokenizer
from mars.evaluation.composition import Truth, choose_tasks
from mars.image_tokenizer.model import ImageTokenizer

SHIPPED = Path("src/mars/assets/mars-mini")
BATCH = 16


def rebuild_with(image_tokenizer: ImageTokenizer) -> Callable[[Sequence[Image.Image]], list[Image.Image]]:
    """Pictures to codes and back."""

    @torch.inference_mode()
    def rebuild(pictures: Sequence[Image.Image]) -> list[Image.Image]:
        images = torch.stack([torch.from_numpy(np.array(one)) for one in pictures]).permute(0, 3, 1, 2).float() / 255
        rebuilt = torch.cat([image_tokenizer.decode(image_tokenizer.encode(some)) for some in images.split(BATCH)])
        return [Image.fromarray(one) for one in (rebuilt * 255).round().byte().permute(0, 2, 3, 1).numpy()]

    return rebuild


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED, help="a folder with an image tokenizer")
    parser.add_argument("--prompts", type=int, default=100, help="of each category, if there are as many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    image_tokenizer, _ = load_image_tokenizer(asked.folder)
    chosen = choose_tasks(count=asked.prompts, seed=asked.seed, size=128)
    rebuild = rebuild_with(image_tokenizer)
    print("| category | n | true | reconstructed | nearest codes |\n|---|--:|--:|--:|--:|")  # noqa: T201
    for category, tasks in chosen.items():
        truth = Truth.of(tasks, rebuild=rebuild)
        bias_V = image_tokenizer.quantizer.bias.clone()
        image_tokenizer.quantizer.bias.zero_()
        nearest = Truth.of(tasks, rebuild=rebuild)
        image_tokenizer.quantizer.bias.copy_(bias_V)
        rates = [f"{one.mean():.1%}" for one in (truth.detector, truth.ceiling, nearest.ceiling)]
        print(f"| {category} | {len(tasks)} | {' | '.join(rates)} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
