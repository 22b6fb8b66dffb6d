"""Which of the candidates that were drawn for a picture is kept: what the model finds likeliest, or as a scorer says.

Letters: B candidates, T positions, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mars.config import find_callable
from mars.errors import MarsError, PromptError, RequestError
from mars.sequence.layout import IGNORE, read_image, written_text
from mars.sequence.text import CAPTION_HINTS, caption_language

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

T = TypeVar("T")
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
        return self.of_codes(prompt, [self.pipe.encode(image) for image in images])

    @torch.inference_mode()
    def of_codes(self, prompt: str, codes: Sequence[Tensor]) -> list[float]:
        """The same of pictures that the image tokenizer need not encode: codes (R, C) each, that were drawn.

        Raises:
            PromptError: if the prompt is empty.
            RequestError: if picture and prompt do not fit into the LLM's positions.
        """
        if not prompt.strip():
            raise PromptError("the prompt must not be empty where pictures are chosen by it; say what they show")
        model = self.pipe.model
        transformer, tokenizer = model.transformer, model.text_tokenizer
        hint = tokenizer.encode(CAPTION_HINTS[caption_language(prompt)])
        text = written_text(
            [tokenizer.encode(prompt.strip())] * len(codes), transformer.vocabulary, hints=[hint] * len(codes),
            end=tokenizer.eos_id,
        )  # fmt: skip
        image = read_image(torch.stack(list(codes)), transformer.vocabulary)
        length, limit = image.ids.shape[1] + text.ids.shape[1], transformer.config.language.max_positions
        if length > limit:
            raise RequestError(f"picture and caption must fit into {limit} positions, got {length}; shorten the prompt")
        cache = transformer.new_cache()
        transformer(image.to(transformer.device), cache)
        hidden_BTD = transformer(text.to(transformer.device), cache)
        assert text.targets is not None
        told = text.targets[0] != IGNORE
        targets_BT = text.targets[:, told].to(transformer.device)
        logits_BTV = transformer.text_logits(hidden_BTD[:, told]).float()
        found: list[float] = logits_BTV.log_softmax(dim=2).gather(2, targets_BT[..., None]).sum(dim=(1, 2)).tolist()
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


def scorer_name(scorer: Callable[..., Any]) -> str:
    """What is written into a picture: a name that `find_scorer` finds, where there is one."""
    if isinstance(scorer, CaptionLikelihood):
        return "caption"
    named = scorer if hasattr(scorer, "__qualname__") else type(scorer)
    return f"{named.__module__}:{named.__qualname__}"


def best_picture(scorer: Callable[[str, list[T]], Iterable[float]], prompt: str, images: Sequence[T]) -> int:
    """The number of the picture, or of its codes, that a scorer prefers.

    Raises:
        RequestError: if it fails, or does not give one number for each.
    """
    try:
        scores = [float(score) for score in scorer(prompt, list(images))]
    except MarsError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise RequestError(f"the scorer {scorer_name(scorer)} failed: {type(error).__name__}: {said:.200}") from error
    if len(scores) != len(images) or any(map(math.isnan, scores)):
        told = ", ".join(f"{score:g}" for score in scores[:8])
        raise RequestError(
            f"the scorer {scorer_name(scorer)} must give a number for each of {len(images)} pictures, got "
            f"{len(scores)}: {told or 'none'}"
        )
    return max(range(len(scores)), key=scores.__getitem__)
