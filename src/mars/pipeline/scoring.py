"""Which of the candidates that were drawn for a picture is kept: what the model finds likeliest, or as a scorer says.

Letters: B candidates, T positions, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from mars.config import find_callable
from mars.errors import MarsError, PromptError, RequestError
from mars.sequence.layout import IGNORE, read_image, written_text
from mars.sequence.text import CAPTION_HINTS, caption_language

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

AT_ONCE = 64
"""Pictures whose captions are judged together: enough for large products, not too many logits."""
Scorer = Callable[[str, list[Image.Image]], Iterable[float]]
"""A prompt, and the pictures that were drawn for it: a score of each. The highest is kept, of equals the first."""


@dataclass(frozen=True)
class CaptionLikelihood:
    """A scorer: how likely the model finds the prompt as the picture's caption, in nats.

    It reads the pictures as `MarsPipeline.caption` does, in the language of the prompt, so the language expert must not
    have been released.
    """

    pipe: "MarsPipeline"

    def __call__(self, prompt: str, images: Sequence[Image.Image]) -> list[float]:
        """As `Scorer`; errors are those of `of_codes`."""
        return self.of_codes([prompt], [[self.pipe.encode(image) for image in images]])[0]

    def of_codes(self, prompts: Sequence[str], codes: Sequence[Sequence[Tensor]]) -> list[list[float]]:
        """The same of pictures that the image tokenizer need not encode, and of several prompts together.

        Args:
            codes: (R, C) of each picture that was drawn for each prompt, of one size.

        Raises:
            PromptError: if a prompt is empty.
            RequestError: if picture and prompt do not fit into the LLM's positions.
        """
        if not all(prompt.strip() for prompt in prompts):
            raise PromptError("the prompt must not be empty where pictures are chosen by it; say what they show")
        pairs = [(prompt.strip(), one) for prompt, drawn in zip(prompts, codes, strict=True) for one in drawn]
        keys = [(prompt, one.numpy(force=True).tobytes()) for prompt, one in pairs]
        differing = dict(zip(keys, pairs, strict=True))  # candidates are often the same picture
        asked = list(differing.values())
        nats = [one for start in range(0, len(asked), AT_ONCE) for one in self._read(asked[start : start + AT_ONCE])]
        scores = dict(zip(differing, nats, strict=True))
        found = (scores[key] for key in keys)
        return [list(islice(found, len(drawn))) for drawn in codes]

    @torch.inference_mode()
    def _read(self, pairs: Sequence[tuple[str, Tensor]]) -> list[float]:
        """Nats of each prompt after its picture's codes."""
        model = self.pipe.model
        transformer, tokenizer = model.transformer, model.text_tokenizer
        text = written_text(
            [tokenizer.encode(prompt) for prompt, _ in pairs], transformer.vocabulary,
            hints=[tokenizer.encode(CAPTION_HINTS[caption_language(prompt)]) for prompt, _ in pairs],
            end=tokenizer.eos_id,
        )  # fmt: skip
        image = read_image(torch.stack([codes for _, codes in pairs]), transformer.vocabulary)
        length, limit = image.ids.shape[1] + text.ids.shape[1], transformer.config.language.max_positions
        if length > limit:
            raise RequestError(f"picture and caption must fit into {limit} positions, got {length}; shorten the prompt")
        cache = transformer.new_cache()
        transformer(image.to(transformer.device), cache)
        hidden_BTD = transformer(text.to(transformer.device), cache)
        assert text.targets is not None
        rows, places = (text.targets != IGNORE).nonzero(as_tuple=True)
        targets_N = text.targets[rows, places].to(transformer.device)
        logits_NV = transformer.text_logits(hidden_BTD[rows, places]).float()
        nats_N = -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
        found: list[float] = nats_N.new_zeros(len(pairs)).index_add_(0, rows.to(nats_N.device), nats_N).tolist()
        return found


def find_scorer(pipe: "MarsPipeline", name: str) -> Scorer | None:
    """The scorer of a name: `likelihood` is none but the model's own, `caption`, or package.module:function.

    Raises:
        ConfigError: if there is no such function.
    """
    match name:
        case "likelihood":
            return None
        case "caption":
            return CaptionLikelihood(pipe)
    found: Scorer = find_callable(name, what="the scorer must be likelihood, caption, or")
    return found


def scorer_name(scorer: Scorer) -> str:
    """What is written into a picture: a name that `find_scorer` finds, where there is one."""
    if isinstance(scorer, CaptionLikelihood):
        return "caption"
    named = scorer if hasattr(scorer, "__qualname__") else type(scorer)
    return f"{named.__module__}:{named.__qualname__}"


def best_pictures(scorer: Scorer, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[int]:
    """The number of the picture of each prompt that a scorer prefers.

    Raises:
        RequestError: if it fails, or does not give one number for each.
    """
    return _best(scorer, lambda: [scorer(*both) for both in zip(prompts, map(list, images), strict=True)], images)


def best_codes(scorer: CaptionLikelihood, prompts: Sequence[str], codes: Sequence[Sequence[Tensor]]) -> list[int]:
    """As `best_pictures`, of codes (R, C)."""
    return _best(scorer, lambda: scorer.of_codes(prompts, codes), codes)


def _best(
    scorer: Scorer, score: Callable[[], Sequence[Iterable[float]]], drawn: Sequence[Sequence[Image.Image | Tensor]]
) -> list[int]:  # fmt: skip
    try:
        every = [[float(one) for one in scores] for scores in score()]
    except MarsError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise RequestError(f"the scorer {scorer_name(scorer)} failed: {type(error).__name__}: {said:.200}") from error
    for scores, pictures in zip(every, drawn, strict=True):
        if len(scores) != len(pictures) or any(map(math.isnan, scores)):
            told = ", ".join(f"{score:g}" for score in scores[:8])
            raise RequestError(
                f"the scorer {scorer_name(scorer)} must give a number for each of {len(pictures)} pictures, got "
                f"{len(scores)}: {told or 'none'}"
            )
    return [max(range(len(scores)), key=scores.__getitem__) for scores in every]
