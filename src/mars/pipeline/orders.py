"""What is asked of a pipeline, checked and turned into requests of the engine; and what comes of it.

Letters: B pictures, R rows, C columns.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from mars.errors import PromptError, RequestError
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.generation.scheduler import MAX_TOKENS
from mars.picture import GeneratedImage, on_white_page, open_picture
from mars.pipeline.checks import all_seeds, find_grid
from mars.pipeline.scoring import Scorer, scorer_name
from mars.pipeline.upscaling import (
    UPSCALE_DEVIATION,
    UPSCALE_SAMPLING,
    bicubic_priors,
    check_low_codes,
    find_upscaling,
    has_prior,
)

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

MAX_IMAGES = 64
"""Pictures in one order; more rows than this only wait for each other."""
DEFAULT_SAMPLING = Sampling(temperature=0.6, top_k=0, top_p=1.0, guidance=1.4, candidates=4)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Pictures and how they came about, in the order of prompts, then of `n`."""

    images: list[GeneratedImage]
    prompts: list[str]
    seeds: list[int]
    codes: Tensor
    """(pictures, rows, columns) int64."""
    seconds: dict[str, float]
    """Time spent on `prompt_and_codes` and `pixels`, and the `total`."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for in one go: pictures of one size."""

    prompts: list[str]
    seeds: list[int]
    requests: list[DrawRequest]
    settings: list[dict[str, Any]]
    """What is written into the pictures."""
    keep: Callable[[Image.Image], Image.Image] | None = None
    """Puts pixels that are kept into a picture that was drawn."""
    scorer: Scorer | None = None
    """Who chooses among candidates; null for the model's own likelihood."""

    @property
    def tokens(self) -> int:
        """Room for those of `Drawings` that draw nothing else: at least one picture always fits."""
        return max(MAX_TOKENS, *(len(one.texts) * one.length for one in self.requests))

    @property
    def codes(self) -> int:
        """Codes to draw, all candidates counted."""
        return sum(one.sampling.candidates * one.places for one in self.requests)


def draw_order(
    pipe: "MarsPipeline",
    prompt: str | Sequence[str],
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    width: int | None = None,
    height: int | None = None,
    negative_prompt: str = "",
    sampling: Sampling = DEFAULT_SAMPLING,
    scorer: Scorer | None = None,
    empty: bool = False,
) -> Order:
    """Pictures to draw; arguments and errors are those of `MarsPipeline.__call__`. `empty` allows empty prompts."""
    if scorer is not None and sampling.candidates == 1:
        raise RequestError("a scorer chooses among candidates, and there is 1; ask for more")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise PromptError("there must be at least one prompt, got none")
    if n < 1 or n * len(prompts) > MAX_IMAGES:
        raise RequestError(
            f"a call draws 1 to {MAX_IMAGES} pictures, got n = {n} for {len(prompts)} prompts; make several calls"
        )
    if not empty:
        pipe.check_prompts(prompts)
    grid = find_grid(width, height, sizes=pipe.sizes, factor=pipe.model.image_tokenizer.config.factor)
    seeds = all_seeds(seed, prompts=len(prompts), n=n)
    repeated, cell = [text for text in prompts for _ in range(n)], pipe.model.transformer.vocabulary.cell
    ids = {text: pipe.prompt_ids(text) for text in {*prompts, negative_prompt}}
    requests = [
        DrawRequest(
            prompt=ids[text], free=ids[negative_prompt], grid=grid, seed=number, sampling=sampling, side=cell, cell=cell
        )
        for text, number in zip(repeated, seeds, strict=True)
    ]
    settings = {"negative_prompt": negative_prompt, **asdict(sampling)}
    if scorer is not None:
        settings["scorer"] = scorer_name(scorer)
    return Order(
        prompts=repeated, seeds=seeds, requests=requests, settings=[settings] * len(seeds), scorer=scorer
    )  # fmt: skip


def upscale_order(
    pipe: "MarsPipeline",
    picture: str | Path | Image.Image | Tensor | Generated,
    *,
    prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    negative_prompt: str = "",
    sampling: Sampling = UPSCALE_SAMPLING,
    deviation: float | None = UPSCALE_DEVIATION,
) -> Order:
    """Pictures to draw again; arguments and errors are those of `MarsPipeline.upscale`."""
    how = find_upscaling(pipe.model.info)
    drawn: list[dict[str, Any]] = []
    whole: list[Image.Image] | None = None
    if isinstance(picture, Generated):
        prompt = picture.prompts if prompt is None else prompt
        seed = picture.seeds if seed is None else seed
        drawn = [json.loads(image.info["settings"]) for image in picture.images]
        codes = picture.codes
    elif isinstance(picture, Tensor):
        codes = picture
    else:
        image = open_picture(Path(picture)) if isinstance(picture, str | Path) else picture
        codes, whole = pipe.encode(image)[None], [on_white_page(image, size=pipe.sizes[0])]
    check_low_codes(codes, grids=pipe.model.info.grids)
    prompts = [prompt or ""] * len(codes) if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(codes):
        raise RequestError(f"there must be one prompt, or one per picture ({len(codes)}), got {len(prompts)}")
    seeds = all_seeds(seed, prompts=len(codes), n=1)
    ids = {text: pipe.prompt_ids(text) for text in {*prompts, negative_prompt}}
    grid = codes.shape[1] * how.scale, codes.shape[2] * how.scale
    if not has_prior(pipe.model.image_tokenizer):
        deviation = None
    priors: Sequence[Tensor | None] = [None] * len(codes)
    if deviation is not None:
        small = whole or pipe.decode(codes)
        priors = bicubic_priors(pipe.model.image_tokenizer, small, grid=grid, deviation=deviation)
    requests = [
        DrawRequest(
            prompt=ids[text], free=ids[negative_prompt], grid=grid, seed=number, sampling=sampling, low=low,
            prior=prior, side=how.side, cell=pipe.model.transformer.vocabulary.cell,
        )
        for text, number, low, prior in zip(prompts, seeds, codes, priors, strict=True)
    ]  # fmt: skip
    asked = {
        "deviation": deviation,
        "codes_per_step": how.codes_per_step,
        "negative_prompt": negative_prompt,
        **asdict(sampling),
    }
    settings = [{**before, "upscale": asked} for before in drawn or [{}] * len(codes)]
    return Order(prompts=prompts, seeds=seeds, requests=requests, settings=settings)
