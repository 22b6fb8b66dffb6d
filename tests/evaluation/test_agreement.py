from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mars.data.curation.clip import Clip
from mars.evaluation import agreement as module
from mars.evaluation.agreement import agreement

DICE = np.random.default_rng(0)
PICTURES = [Image.fromarray(DICE.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(12)]
PROMPTS = [f"{number} {number + 20}" for number in range(12)]


def test_figures_are_those_of_the_formulas(clip_folder: Path) -> None:
    clip = Clip(clip_folder)
    found = agreement(clip, PICTURES, PROMPTS, seed=0)
    cosines = clip.images(PICTURES) @ clip.texts(PROMPTS).T
    assert found["clip_score"] == pytest.approx(float(2.5 * cosines.diagonal().clamp(min=0).mean()), abs=1e-5)
    assert found["r_precision"] == float((cosines.argmax(dim=1) == torch.arange(12)).double().mean())
    assert (found["pictures"], found["choices"]) == (12, 12)
    for name in ("clip_score", "r_precision"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high


def test_of_all_prompts_one_picture_is_right_for_the_closest(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Clip(clip_folder)
    assert agreement(clip, PICTURES[:1] * 12, PROMPTS, seed=0)["r_precision"] == 1 / 12
    monkeypatch.setattr(module, "CHOICES", 1)
    assert agreement(clip, PICTURES[:1] * 12, PROMPTS, seed=0)["r_precision"] == 1  # nothing to be told from


def test_pictures_of_one_prompt_do_not_compete(clip_folder: Path) -> None:
    found = agreement(Clip(clip_folder), PICTURES[:4], ["3 4"] * 4, seed=0)
    assert (found["r_precision"], found["choices"]) == (1, 1)
