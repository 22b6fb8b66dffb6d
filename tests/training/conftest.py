"""A tiny transformer in both shapes, and the gradients that a loss gives it."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mars.model.transformer import MarsTransformer


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def gradients(transformer: MarsTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}
