"""The mean of two models, weight by weight: most of what either can do, where one was trained from the other.

    python -m benchmarks.average_models BEFORE AFTER --share 0.5 --out DIR

SHARE is AFTER's: 0 gives BEFORE, 1 gives AFTER. Both must have the same shapes, LLM and codes; the image tokenizer
(its decoder may differ) is AFTER's. Found useful and named "model soups" by Wortsman et al., arXiv 2203.05482.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mars.checkpoint import check_tensors, codes_digest, copy_tensors, load_image_tokenizer, read_info, read_tensors
from mars.errors import ModelError
from mars.pipeline import MarsPipeline


def mean(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """Every weight of `before`, moved by `share` of the way to that of `after`, in the dtype of `after`."""
    return {name: before[name].to(weight.dtype).lerp(weight, share) for name, weight in after.items()}


def check_alike(before: Path, after: Path) -> None:
    """Raises `ModelError` where the two folders differ in more than weights."""
    (info, config), (other_info, other_config) = read_info(before), read_info(after)
    differ = []
    if config != other_config:
        differ.append("shapes")
    if info.language_digest != other_info.language_digest:
        differ.append("LLM")
    if codes_digest(load_image_tokenizer(before)[0]) != codes_digest(load_image_tokenizer(after)[0]):
        differ.append("codes")
    if differ:
        raise ModelError(f"{before} and {after} differ in {' and '.join(differ)}; only models alike have a mean")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the mean as a model of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of AFTER, from 0 to 1")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    asked = parser.parse_args(arguments)
    if not 0 <= asked.share <= 1:
        parser.error(f"--share must be from 0 to 1, got {asked.share:g}")
    check_alike(asked.before, asked.after)
    before = read_tensors(asked.before / "visual.safetensors")
    pipe = MarsPipeline.from_pretrained(asked.after, precision="fp32")
    after = pipe.model.transformer.visual_tensors()
    check_tensors(before, after, where=str(asked.before))
    copy_tensors(mean(before, after, share=asked.share), into=after, where="the mean")
    pipe.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
