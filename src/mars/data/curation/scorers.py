"""Scores of pictures: what a scorer is, how one is opened by its name, and two that need no weights."""

import importlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mars.data.curation.config import ScorerConfig
from mars.data.shards import Caption
from mars.errors import ConfigError

SHARPNESS_SIDE = 256


class Scorer(Protocol):
    """Anything with a name that gives each picture a number; a class of one's own is named in the configuration."""

    @property
    def name(self) -> str:
        """By which scores are stored and reported."""

    @property
    def digest(self) -> str:
        """Of its weights (`files_digest`), empty without any: a curated set is not continued with others."""

    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:
        """A number for each RGB picture and its captions; None (or NaN) where it cannot be judged, and is not
        dropped."""


def open_scorer(config: ScorerConfig) -> Scorer:
    """The scorer of `module:Class`, made with its options.

    Raises:
        ConfigError: if there is no such class, or it does not take these options.
    """
    module, _, name = config.scorer.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), name)(**config.options)
    except ImportError as error:
        raise ConfigError(f"the scorer {config.scorer} cannot be imported ({error}); is PYTHONPATH right?") from None
    except AttributeError:
        raise ConfigError(f"the module {module} must hold the scorer {name}, but does not") from None
    except TypeError as error:
        raise ConfigError(f"the scorer {config.scorer} does not take these options: {error}") from None
    texts = (getattr(made, "name", None), getattr(made, "digest", None))
    if not all(isinstance(text, str) for text in texts) or not callable(getattr(made, "score", None)):
        raise ConfigError(
            f"the scorer {config.scorer} must have a name, a digest of its weights (empty without any) and a method "
            "score(images, captions)"
        )
    scorer: Scorer = made
    return scorer


class Colourfulness:
    """How colourful people find a picture: 0 for grey, about 50 for colourful, above 100 for garish.

    Hasler and Süsstrunk (2003), "Measuring colourfulness in natural images", the measure M(3).
    """

    name, digest = "colourfulness", ""

    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:  # noqa: ARG002
        """Captions do not matter."""
        return [self._of(image) for image in images]

    @staticmethod
    def _of(image: Image.Image) -> float:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), 2, 0)
        first, second = red - green, (red + green) / 2 - blue
        spread = math.hypot(first.std(), second.std())
        return round(spread + 0.3 * math.hypot(first.mean(), second.mean()), 4)


class Sharpness:
    """Variance of the Laplacian of the grey picture, its longer side 256 pixels: near 0 for blurred or empty pictures.

    Pech-Pacheco et al. (2000), "Diatom autofocusing in brightfield microscopy". Smaller pictures are not enlarged.
    """

    name, digest = "sharpness", ""

    def score(self, images: Sequence[Image.Image], captions: Sequence[Sequence[Caption]]) -> list[float | None]:  # noqa: ARG002
        """Captions do not matter."""
        return [self._of(image) for image in images]

    @staticmethod
    def _of(image: Image.Image) -> float | None:
        small = image.convert("L")
        small.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.LANCZOS)
        grey = np.asarray(small, dtype=np.float64)
        if min(grey.shape) < 3:
            return None
        middle = grey[1:-1, 1:-1]
        laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
        return round(float(laplacian.var()), 4)
