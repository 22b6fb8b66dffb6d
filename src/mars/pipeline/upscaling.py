"""How a pipeline's model was trained to upscale, and what is asked of it.

Letters: B pictures, R rows, C columns.
"""

from collections.abc import Sequence

from torch import Tensor

from mars.checkpoint import ModelInfo
from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.model.config import UpscaleConfig

UPSCALE_SAMPLING = Sampling(temperature=0)
"""The likeliest codes: they keep closest to the small picture, and the codes of one step are not drawn apart."""


def find_upscaling(info: ModelInfo) -> UpscaleConfig:
    """How a model was trained to upscale.

    Raises:
        RequestError: if it was not.
    """
    if info.upscale is None:
        raise RequestError(f"{info.name} was not trained to upscale; open a model of `mars train` in stage upscale")
    return info.upscale


def check_low_codes(low_BRC: Tensor, *, grids: Sequence[tuple[int, int]]) -> None:
    """Raises RequestError if codes have another shape than (pictures, rows, columns) of one of the grids."""
    if low_BRC.dim() != 3 or not len(low_BRC) or tuple(low_BRC.shape[1:]) not in grids:
        known = " or ".join(f"(pictures, {rows}, {columns})" for rows, columns in grids)
        raise RequestError(f"codes to upscale must have the shape {known}, got {tuple(low_BRC.shape)}")
