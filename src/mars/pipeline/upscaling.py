"""What a pipeline's model was trained to upscale, and the requests for it.

Letters: B pictures, R rows, C columns.
"""

from collections.abc import Sequence

from torch import Tensor

from mars.checkpoint import ModelInfo
from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.generation.super_resolution import UpscaleRequest
from mars.model.config import UpscaleConfig

UPSCALE_SAMPLING = Sampling(temperature=0)
"""The likeliest codes: they keep closest to the small picture, and the codes of one step are not drawn apart."""


def find_upscaling(info: ModelInfo) -> UpscaleConfig:
    """What a model was trained to refine.

    Raises:
        RequestError: if that is nothing.
    """
    if info.upscale is None:
        raise RequestError(f"{info.name} was not trained to upscale; open a model of `mars train` in stage upscale")
    return info.upscale


def upscale_requests(
    how: UpscaleConfig,
    low_BRC: Tensor,
    prompts: Sequence[tuple[int, ...]],
    *,
    free: tuple[int, ...],
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[UpscaleRequest]:
    """A request per picture.

    Raises:
        RequestError: if the grid is not the one that is refined, or there is not one prompt each.
    """
    if low_BRC.dim() != 3 or not len(low_BRC) or tuple(low_BRC.shape[1:]) != how.low:
        raise RequestError(
            f"codes to upscale must have the shape (pictures, {how.low[0]}, {how.low[1]}), got {tuple(low_BRC.shape)}"
        )
    if len(prompts) != len(low_BRC):
        raise RequestError(f"there must be one prompt, or one per picture ({len(low_BRC)}), got {len(prompts)}")
    return [
        UpscaleRequest(prompt=prompt, free=free, seed=seed, sampling=sampling, low=low)
        for prompt, seed, low in zip(prompts, seeds, low_BRC, strict=True)
    ]
