"""How well pictures agree with their prompts in the space of a CLIP: CLIPScore and R-precision.

Letters: N pictures, T texts, D numbers of a vector.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mars.data.curation.clip import Clip
from mars.evaluation.metrics import Floats, interval, ranks, resample

CHOICES = 100
"""Prompts that the right one must be told from, itself among them (R-precision of Xu et al. 2018: AttnGAN)."""
CHUNK = 256
SCALE = 2.5
"""Of CLIPScore (Hessel et al. 2021)."""


def agreement(clip: Clip, images: Sequence[Image.Image], prompts: Sequence[str], *, seed: int) -> dict[str, Any]:
    """CLIPScore (0..2.5, mean of 2.5 times the cosine, at least 0) and top-1 R-precision, with 95 % intervals.

    Prompts that R-precision chooses from are others of the same list; where there are fewer than `CHOICES`, all.
    """
    texts = list(dict.fromkeys(prompts))
    texts_TD = clip.texts(texts)
    images_ND = torch.cat([clip.images(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)])
    places = [texts.index(prompt) for prompt in prompts]
    scores = SCALE * (images_ND * texts_TD[places]).sum(dim=1).clamp(min=0).double().numpy()
    found = _precision(images_ND, texts_TD, places=places, seed=seed)
    return {
        "pictures": len(images),
        "choices": min(CHOICES, len(texts)),
        "clip_score": float(scores.mean()),
        "clip_score_interval": interval(resample([scores], seed=seed)[0]),
        "r_precision": float(found.mean()),
        "r_precision_interval": interval(resample([found], seed=seed)[0]),
    }


def _precision(images_ND: Tensor, texts_TD: Tensor, *, places: Sequence[int], seed: int) -> Floats:
    """1 where the right prompt is closer than all the others that it is told from."""
    dice, right = random.Random(seed), []
    for image_D, place in zip(images_ND, places, strict=True):
        others = [other for other in range(len(texts_TD)) if other != place]
        chosen = [place, *dice.sample(others, min(CHOICES - 1, len(others)))]
        right.append(int(ranks(image_D[None], texts_TD[chosen], right=0)[0]) == 0)
    return np.array(right, dtype=np.float64)
