"""Which pictures does a model draw wrongly though it was trained on them? Those, as a code shard of their own.

    python -m benchmarks.hard_pictures MODEL assets/codes/emoji.parquet --nats 1.5 --out data/hard.parquet

A picture is hard if after one of its names its codes are unlikely: -log p(all codes | name) is above so many nats, so
that at temperature 1 the picture comes out as it is less often than once in e^nats (1.5: once in 4.5). Trained on with
`repeats` of their own beside the whole shard, the hard ones come more often. Nothing is drawn: codes are given.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.checkpoint import codes_digest
from mars.data.shards import CodedPicture, read_codes, write_codes
from mars.errors import DataError
from mars.model.transformer import read_prefixes
from mars.pipeline import MarsPipeline
from mars.training.losses import text_to_image_states

AT_ONCE = 48


@torch.inference_mode()
def name_nats(pipe: MarsPipeline, pictures: Sequence[CodedPicture]) -> dict[str, float]:
    """By key, -log p(codes | name) of a picture in nats, of its names the largest; pictures must share one grid."""
    named = [
        (pipe.prompt_ids(caption.text), one.record.key, torch.from_numpy(one.codes).long())
        for one in pictures
        for caption in one.record.captions
        if caption.kind == "name"
    ]
    named.sort(key=lambda item: len(item[0]))  # alike in length, so that little is padded
    found: dict[str, float] = {}
    for start in range(0, len(named), AT_ONCE):
        prompts, keys, codes = zip(*named[start : start + AT_ONCE], strict=True)
        for key, nats in zip(keys, _nats(pipe, prompts, torch.stack(codes)).tolist(), strict=True):
            found[key] = max(nats, found.get(key, 0.0))
    return found


def _nats(pipe: MarsPipeline, prompts: Sequence[tuple[int, ...]], codes_BRC: Tensor) -> Tensor:
    transformer = pipe.model.transformer
    states_ND, codes_N = text_to_image_states(transformer, codes_BRC, read_prefixes(transformer, prompts))
    table_VD = transformer.visual_table[: transformer.vocabulary.num_codes]  # a picture has no other ids
    nats_N = F.cross_entropy(F.linear(states_ND, table_VD), codes_N, reduction="none")
    return nats_N.reshape(len(prompts), -1).sum(dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the shard, and says how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("codes", type=Path, help="the code shard that it was trained on")
    parser.add_argument("--nats", type=float, default=1.5, help="hard is what has more")
    parser.add_argument("--out", type=Path, required=True, help="the shard to write")
    asked = parser.parse_args(arguments)
    pictures, digest = read_codes(asked.codes)
    pipe = MarsPipeline.from_pretrained(asked.model, precision="fp32")
    if digest != codes_digest(pipe.model.image_tokenizer):
        raise DataError(f"the codes of {asked.codes} are not of the image tokenizer of {asked.model}")
    trained = [one for one in pictures if one.record.split == "train"]
    nats = name_nats(pipe, trained)
    hard = [one for one in trained if nats.get(one.record.key, 0.0) > asked.nats]
    if not hard:
        raise DataError(f"no picture has more than {asked.nats:g} nats; ask for fewer with --nats")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_codes(asked.out, hard, tokenizer=digest)
    mean = sum(nats.values()) / len(nats)
    print(f"{asked.out}: {len(hard):,} of {len(trained):,} pictures; all have {mean:.2f} nats on the mean")  # noqa: T201


if __name__ == "__main__":
    main()
