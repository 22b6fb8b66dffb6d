"""How a pipeline's model was trained to upscale, and what is asked of it.

Letters: B pictures, R rows, C columns, V codes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mars.checkpoint import ModelInfo
from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import UpscaleConfig

UPSCALE_SAMPLING = Sampling(temperature=0)
"""The likeliest codes: they keep closest to the small picture, and the codes of one step are not drawn apart."""

UPSCALE_DEVIATION = 0.2
"""Chosen for mars-mini, whose own upscaling was trained little, on held-out emoji (docs/log.md)."""
MOST_CODES = 2**16
"""A codebook that is larger has no prior: it would take a gigabyte for a picture of 64 by 64 codes."""


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


def has_prior(codec: ImageTokenizer) -> bool:
    """Whether a codebook is small enough for priors."""
    return codec.config.num_codes <= MOST_CODES


@torch.inference_mode()
def bicubic_priors(
    codec: ImageTokenizer, small: Sequence[Image.Image], *, grid: tuple[int, int], deviation: float
) -> list[Tensor]:
    """What a bicubic enlargement says of the codes of the larger picture: log p (R, C, V) of each, up to a constant.

    Codes are taken to be spread normally around the vectors that the image tokenizer makes of the enlargement. So a
    model that was trained little adds detail where it is sure of it, and elsewhere is no worse than the enlargement.

    Args:
        small: as large or as small as one likes.
        deviation: standard deviation, where 1 is that of the codebook.

    Raises:
        RequestError: unless the deviation is positive.
    """
    if not deviation > 0:
        raise RequestError(f"deviation must be positive, or none for the model alone, got {deviation}")
    book_VZ = codec.quantizer.decode(torch.arange(codec.config.num_codes, device=codec.quantizer.bias.device))
    scale = 2 * deviation**2 * float(book_VZ.var(dim=0).mean())
    size = grid[1] * codec.config.factor, grid[0] * codec.config.factor
    priors = []
    for image in small:
        large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)).copy()
        pixels = torch.from_numpy(large).permute(2, 0, 1)[None].to(book_VZ.device).float() / 255
        vectors_NZ = codec.to_vectors(pixels)[0].flatten(1).T
        scores_NV = codec.quantizer.scores(vectors_NZ) + codec.quantizer.bias
        priors.append((scores_NV / scale).view(*grid, -1))
    return priors
