"""How well do two do on the emoji bench's paraphrases that draw perfectly? No bounds: others may know more of words.

    python benchmarks/paraphrase_oracle.py data/noto.tar [--sentences FOLDER]

A paraphrase is CLDR tags of a picture that training never saw with it ("cheese" for a pizza). Whoever answers picks a
training picture and shows it; as in the bench, it is right if the true picture is the closest of 100 to that. Picks:

    by captions    the picture with most of the tags among its trained names, tags and requests (in English as whole
                   words); equals share the score
    by sentences   the picture with the trained caption closest in meaning, as a sentence encoder in FOLDER sees it
                   (any BERT with mean pooling, as all-MiniLM-L6-v2; English)
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mars.data.shards import Picture, read_pictures
from mars.evaluation.config import EmojiBench
from mars.evaluation.features import EfficientNetLite0
from mars.evaluation.metrics import ranks
from mars.evaluation.questions import TRAINED_KINDS, Question
from mars.evaluation.retrieval import ask

Captions = dict[str, list[str]]
"""By key of the picture."""
Picker = Callable[[str], list[str]]
"""A prompt to the keys of pictures."""


def trained_captions(shard: dict[str, Picture], language: str) -> Captions:
    """What training says of its pictures."""
    return {
        key: [one.text for one in picture.record.captions if one.language == language and one.kind in TRAINED_KINDS]
        for key, picture in shard.items()
        if picture.record.split == "train"
    }


def pick_by_captions(prompt: str, captions: Captions) -> list[str]:
    """Keys of the pictures that most of the prompt's tags are said of."""
    tags = [_wanted(tag.strip()) for tag in re.split(r"[,，]", prompt)]
    found = {key: sum(any(map(tag.search, texts)) for tag in tags) for key, texts in captions.items()}
    most = max(found.values())
    return [key for key, number in found.items() if number == most] if most else []


def _wanted(tag: str) -> re.Pattern[str]:
    """Finds a tag: as whole words, which Chinese does not part."""
    edge = r"\b" if tag.isascii() else ""
    return re.compile(f"{edge}{re.escape(tag)}{edge}", re.IGNORECASE)


class SentencePicker:
    """Picks by meaning.

    Args:
        folder: a BERT and its tokenizer, in the hub's layout.
    """

    def __init__(self, folder: Path, captions: Captions) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.keys = [key for key, texts in captions.items() for _ in set(texts)]
        self.vectors_ND = self._vectors([text for texts in captions.values() for text in set(texts)])

    @torch.inference_mode()
    def _vectors(self, texts: list[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), 256):
            rows = self.tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
            mask_BT1 = rows["attention_mask"][..., None]
            found.append((self.model(**rows).last_hidden_state * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def __call__(self, prompt: str) -> list[str]:
        """The key of the picture with the closest caption."""
        return [self.keys[int((self.vectors_ND @ self._vectors([prompt])[0]).argmax())]]


def share_right(question: Question, keys: list[str], features: dict[str, Tensor]) -> float:
    """How many of the pictures of these keys have the true one as their closest of the candidates."""
    if not keys:
        return 0.0
    shown_QD = torch.stack([features[key] for key in keys])
    candidates_CD = torch.stack([features[key] for key in question.candidates])
    return (ranks(shown_QD, candidates_CD, right=0) == 0).float().mean().item()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the shard of the emoji bench")
    parser.add_argument("--sentences", type=Path, help="a folder with a sentence encoder")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shard = {picture.record.key: picture for picture in read_pictures(asked.pictures)}
    bench = EmojiBench(pictures=asked.pictures, prompts=2 * asked.prompts, sets=("paraphrases",))
    questions = ask(shard, bench, seed=asked.seed).questions["paraphrases"]
    pixels = (Image.fromarray(picture.pixels()) for picture in shard.values())
    features = dict(zip(shard, EfficientNetLite0().features_of(pixels), strict=True))
    print("| language | picks | n | top-1 of 100 |\n|---|---|--:|--:|")  # noqa: T201
    for language in ("en", "zh"):
        captions = trained_captions(shard, language)
        pickers: dict[str, Picker] = {"by captions": partial(pick_by_captions, captions=captions)}
        if asked.sentences and language == "en":
            pickers["by sentences"] = SentencePicker(asked.sentences, captions)
        for name, pick in pickers.items():
            right = [share_right(one, pick(one.prompts[language]), features) for one in questions]
            print(f"| {language} | {name} | {len(right)} | {sum(right) / len(right):.1%} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
