"""Super-resolution with the next K tokens: our own design (`sequence/layout.py`), not the paper's.

Letters: B batch, R rows, C columns, K codes of a step.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mars.model.cache import Cache, Prefix
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import low_image, upscaled_image


def upscale_loss(
    transformer: MarsTransformer, low_BRC: Tensor, high_BRC: Tensor, prefixes: Sequence[Prefix], *, side: int
) -> Tensor:
    """Mean cross-entropy of the high-resolution codes after their captions and low-resolution codes, in nats per code.

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
    logits = transformer.visual_logits(transformer(segment, cache)).float()
    return F.cross_entropy(logits.flatten(0, 1), (segment.targets - transformer.vocabulary.first_code).flatten())
