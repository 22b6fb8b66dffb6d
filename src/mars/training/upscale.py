"""Super-resolution with the next K tokens: our own design (`sequence/layout.py`), not the paper's.

Letters: B batch, R rows, C columns, N positions that predict, D width, K codes of a step.
"""

from collections.abc import Sequence

from torch import Tensor

from mars.model.cache import Cache, Prefix
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import low_image, upscaled_image
from mars.training.cross_entropy import token_loss


def upscale_states(
    transformer: MarsTransformer, low_BRC: Tensor, high_BRC: Tensor, prefixes: Sequence[Prefix], *, side: int
) -> tuple[Tensor, Tensor]:
    """States (N, D) that predict the codes of the high grid, after captions and low grids, and the codes (N,) that each
    should predict.

    Args:
        side: codes on each side of a block; K = side * side codes are predicted together.

    Raises:
        ConfigError: if blocks do not fill the high grid, or it is not a whole number of times the low one.
    """
    cache: Cache = transformer.new_cache()
    cache.load(prefixes)
    transformer(low_image(low_BRC, transformer.vocabulary), cache)
    segment = upscaled_image(low_BRC, high_BRC, transformer.vocabulary, side=side)
    assert segment.targets is not None
    states = transformer.code_states(transformer(segment, cache), segment.targets)
    return states.flatten(0, -2), (segment.targets - transformer.vocabulary.first_code).flatten()


def upscale_loss(
    transformer: MarsTransformer, low_BRC: Tensor, high_BRC: Tensor, prefixes: Sequence[Prefix], *, side: int
) -> Tensor:
    """Mean cross-entropy of the codes of the high grid after captions and low grids, in nats per code."""
    states_ND, targets_N = upscale_states(transformer, low_BRC, high_BRC, prefixes, side=side)
    return token_loss(states_ND, transformer.visual_table, targets_N).loss
