"""Who chooses among candidates."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mars.errors import ConfigError, ImageError, PromptError, RequestError
from mars.generation.sampling import Sampling
from mars.generation.scheduler import Finished, Scheduler
from mars.pipeline import MarsPipeline, scoring
from mars.pipeline.drawings import DrawingFailed, Drawings, Drawn
from mars.pipeline.editing import edit_order
from mars.pipeline.orders import draw_order
from mars.pipeline.scoring import CaptionLikelihood, Scorer, find_scorer
from mars.sequence.layout import read_image, text_segment
from mars.sequence.text import CAPTION_HINTS

SAMPLING = Sampling(temperature=1.2, guidance=2.0, candidates=5)


def redness(prompt: str, images: list[Image.Image]) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def candidates(pipe: MarsPipeline, prompt: str, *, seed: int) -> list[torch.Tensor]:
    """The codes of all that are drawn."""
    order = draw_order(pipe, prompt, seed=seed, sampling=SAMPLING)
    scheduler = Scheduler(pipe.model.transformer)
    scheduler.submit(order.requests[0])
    while True:
        for event in scheduler.step():
            if isinstance(event, Finished):
                return [candidate.codes for candidate in event.candidates]


def test_the_candidate_with_the_highest_score_is_kept(pipe: MarsPipeline) -> None:
    seen: list[tuple[str, int]] = []

    def watched(prompt: str, images: list[Image.Image]) -> torch.Tensor:
        seen.append((prompt, len(images)))
        return torch.tensor(redness(prompt, images))

    drawn = pipe(["a", "红"], n=2, seed=3, sampling=SAMPLING, scorer=watched)
    assert seen == [("a", 5), ("a", 5), ("红", 5), ("红", 5)]
    likeliest = pipe(["a", "红"], n=2, seed=3, sampling=SAMPLING)
    assert not torch.equal(drawn.codes, likeliest.codes)
    for prompt, seed, image, codes in zip(drawn.prompts, drawn.seeds, drawn.images, drawn.codes, strict=True):
        every = candidates(pipe, prompt, seed=seed)
        scores = redness(prompt, pipe.decode(torch.stack(every)))
        assert torch.equal(codes, every[int(np.argmax(scores))])
        assert redness(prompt, [image])[0] == pytest.approx(max(scores), abs=0.1)


def test_of_equals_the_first_is_kept_and_one_that_cannot_be_may_be_minus_infinity(pipe: MarsPipeline) -> None:
    every = candidates(pipe, "a", seed=3)
    for scores, wanted in (([1.0] * 5, 0), ([-math.inf, -math.inf, 2.0, 2.0, 1.0], 2)):

        def scorer(prompt: str, images: list[Image.Image], scores: list[float] = scores) -> list[float]:
            return scores

        assert torch.equal(pipe("a", seed=3, sampling=SAMPLING, scorer=scorer).codes[0], every[wanted])


def test_an_edit_is_scored_as_it_will_look(pipe: MarsPipeline) -> None:
    seen: list[Image.Image] = []

    def watched(prompt: str, images: list[Image.Image]) -> list[float]:
        seen.extend(images)
        return redness(prompt, images)

    picture, mask = Image.new("RGB", (48, 32), (7, 80, 9)), Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 16, 32))
    drawn = pipe.edit(picture, mask=mask, seed=1, sampling=SAMPLING, scorer=watched)
    assert len(seen) == 5
    assert all(image.getpixel((40, 16)) == (7, 80, 9) for image in seen)
    assert drawn.images[0].tobytes() == max(seen, key=lambda image: redness("", [image])[0]).tobytes()
    assert json.loads(drawn.images[0].info["settings"])["edit"]["scorer"].endswith("watched")


def few(prompt: str, images: list[Image.Image]) -> list[float]:
    return [1.0, 2.0]


def blank(prompt: str, images: list[Image.Image]) -> list[float]:
    return [math.nan, *range(len(images) - 1)]


def fails(prompt: str, images: list[Image.Image]) -> list[float]:
    raise ValueError("no\nmodel")


def nothing(prompt: str, images: list[Image.Image]) -> Iterable[float]:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (few, r":few must give a number for each of 5 pictures, got 2: 1, 2"),
        (blank, r":blank must give a number for each of 5 pictures, got 5: nan, 0, 1, 2, 3"),
        (fails, r":fails failed: ValueError: no model"),
        (nothing, r":nothing failed: TypeError: "),
        (lambda prompt, images: [], r"must give a number for each of 5 pictures, got 0: none"),
        (lambda prompt: [], r"failed: TypeError: "),
        (lambda prompt, images: ["a"] * 5, r"failed: ValueError: could not convert"),
    ],
)  # fmt: skip
def test_a_scorer_that_cannot_be_used_is_one_line(pipe: MarsPipeline, scorer: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        pipe("a", seed=1, sampling=SAMPLING, scorer=scorer)
    assert "\n" not in str(caught.value)


def refuses(prompt: str, images: list[Image.Image]) -> list[float]:
    raise ImageError("not my kind of picture")


@pytest.mark.parametrize("scorer", [fails, refuses])
def test_a_scorer_that_fails_leaves_others_alone(pipe: MarsPipeline, scorer: Scorer) -> None:
    drawings = Drawings(pipe)
    wanted = pipe("x", seed=2)
    bad = drawings.submit(draw_order(pipe, "a", seed=1, sampling=SAMPLING, scorer=scorer))
    good = drawings.submit(draw_order(pipe, "x", seed=2))
    news = [one for _ in iter(lambda: drawings.busy, False) for one in drawings.step()]
    told = {one.drawing: one for one in news if isinstance(one, Drawn | DrawingFailed)}
    assert isinstance(told[bad], DrawingFailed)
    found = told[good]
    assert isinstance(found, Drawn)
    assert torch.equal(found.generated.codes, wanted.codes)


def test_a_scorer_without_a_choice_is_one_line(pipe: MarsPipeline) -> None:
    single = replace(SAMPLING, candidates=1)
    with pytest.raises(RequestError, match="chooses among candidates, and there is 1; ask for more"):
        pipe("a", sampling=single, scorer=redness)
    with pytest.raises(RequestError, match="chooses among candidates"):
        edit_order(pipe, Image.new("RGB", (48, 32)), vary=0.5, sampling=single, scorer=redness)


@pytest.mark.parametrize("prompt", ["he a red apple", "苹果"])
def test_the_caption_scorer_says_how_likely_the_caption_is(pipe: MarsPipeline, prompt: str) -> None:
    images = pipe(["a", "b", "c"], seed=1).images
    found = CaptionLikelihood(pipe)(prompt, images)
    transformer, tokenizer = pipe.model.transformer, pipe.model.text_tokenizer
    hint = tokenizer.encode(CAPTION_HINTS["zh" if prompt == "苹果" else "en"])
    ids = [*tokenizer.encode(prompt), tokenizer.eos_id]
    for image, score in zip(images, found, strict=True):
        wanted, before = 0.0, [transformer.vocabulary.image_end, *hint]
        for one in ids:
            cache = transformer.new_cache()
            with torch.no_grad():
                transformer(read_image(pipe.encode(image)[None], transformer.vocabulary), cache)
                states = transformer(text_segment([before]), cache)
                wanted += float(transformer.text_logits(states[0, -1]).log_softmax(dim=0)[one])
            before.append(one)
        assert score == pytest.approx(wanted, abs=1e-3)
    assert len(set(found)) == 3
    assert CaptionLikelihood(pipe).of_codes([prompt], [list(map(pipe.encode, images))]) == [found]


def test_captions_are_as_likely_together_as_alone(pipe: MarsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, prompts = CaptionLikelihood(pipe), ["a", "he a red apple", "苹果", "red"]
    codes = [list(map(pipe.encode, pipe(["x", "y"], seed=seed).images))[: 1 + seed % 2] for seed in range(4)]
    alone = [scorer.of_codes([prompt], [drawn])[0] for prompt, drawn in zip(prompts, codes, strict=True)]
    for at_once in (64, 4, 1):
        monkeypatch.setattr(scoring, "AT_ONCE", at_once)
        together = scorer.of_codes(prompts, codes)
        assert [pytest.approx(scores, abs=1e-4) for scores in alone] == together
    assert list(map(len, together)) == [1, 2, 1, 2]
    assert scorer.of_codes([], []) == []


def test_equal_candidates_have_equal_scores_for_each_prompt(pipe: MarsPipeline) -> None:
    scorer, (one, other) = CaptionLikelihood(pipe), list(map(pipe.encode, pipe(["x", "y"], seed=1).images))
    found = scorer.of_codes(["a", "red"], [[one, one], [other, one, other.clone()]])
    alone = [scorer.of_codes([prompt], [[codes]])[0][0] for prompt, codes in (("a", one), ("red", other), ("red", one))]
    assert len(set(alone)) == 3
    first, second, third = (pytest.approx(score, abs=1e-4) for score in alone)
    assert found == [[first, first], [second, third, second]]


def test_the_caption_scorer_chooses_and_is_named(pipe: MarsPipeline) -> None:
    scorer = find_scorer(pipe, "caption")
    assert isinstance(scorer, CaptionLikelihood)
    drawn = pipe("a red apple", seed=5, sampling=SAMPLING, scorer=scorer)
    every = candidates(pipe, "a red apple", seed=5)
    scores = scorer.of_codes(["a red apple"], [every])[0]
    assert len(set(scores)) > 1
    assert torch.equal(drawn.codes[0], every[int(np.argmax(scores))])
    assert json.loads(drawn.images[0].info["settings"])["scorer"] == "caption"
    with pytest.raises(PromptError, match="must not be empty where pictures are chosen by it"):
        pipe.edit(drawn.images[0], vary=0.5, sampling=SAMPLING, scorer=scorer)
    with pytest.raises(RequestError, match="must fit into 192 positions, got 195; shorten the prompt"):
        scorer("x" * 179, drawn.images)


def test_a_scorer_of_ones_own_is_found_by_its_name(
    pipe: MarsPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scorer_of_a_test.py").write_text("def green(prompt, images):\n    return range(len(images))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = "own_scorer_of_a_test:green"
    scorer: Scorer | None = find_scorer(pipe, name)
    assert scorer is not None
    drawn = pipe("a", seed=3, sampling=SAMPLING, scorer=scorer)
    assert torch.equal(drawn.codes[0], candidates(pipe, "a", seed=3)[-1])
    assert json.loads(drawn.images[0].info["settings"])["scorer"] == name
    assert find_scorer(pipe, "likelihood") is None
    for wrong in ("own_scorer_of_a_test:red", "captoin", ":", ""):
        with pytest.raises(ConfigError, match="the scorer must be likelihood, caption, or package.module:name"):
            find_scorer(pipe, wrong)
