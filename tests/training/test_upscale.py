from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import ConfigError
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.layout import low_image, text_segment, upscaled_image
from mars.training.upscale import upscale_loss

ROWS = [[1, 40, 41, 42], [1]]
LOW = torch.arange(16).view(2, 2, 4)
HIGH = torch.arange(64).view(2, 4, 8)

every_side = pytest.mark.parametrize("side", [1, 2, 4])


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    options = {**pocket, "max_grid": 8} if request.param == "pocket" else {}
    return build_tiny(**options, low_input=True)


@every_side
def test_the_loss_is_the_mean_surprise_of_each_code(transformer: MarsTransformer, side: int) -> None:
    surprises: list[Tensor] = []
    for row, low, high in zip(ROWS, LOW, HIGH, strict=True):
        cache = transformer.new_cache()
        transformer(text_segment([row]), cache)
        transformer(low_image(low[None], transformer.vocabulary), cache)
        drawn = upscaled_image(low[None], high[None], transformer.vocabulary, side=side)
        shares = transformer.visual_logits(transformer(drawn, cache))[0].detach().softmax(1)
        rows, columns = drawn.places()
        surprises += [-one[high[row, column]].log() for one, row, column in zip(shares, rows, columns, strict=True)]
    assert len(surprises) == 64
    loss = upscale_loss(transformer, LOW, HIGH, read_prefixes(transformer, ROWS), side=side)
    torch.testing.assert_close(loss.detach(), torch.stack(surprises).mean())


@every_side
def test_the_visual_side_learns_and_nothing_else(transformer: MarsTransformer, side: int) -> None:
    transformer.zero_grad()
    upscale_loss(transformer, LOW, HIGH, read_prefixes(transformer, ROWS), side=side).backward()
    moved = {name for name, one in transformer.named_parameters() if one.grad is not None and bool(one.grad.any())}
    assert moved <= transformer.visual_tensors().keys()
    assert {"low_projection.weight", "visual_embedding.weight", "visual_head.weight"} <= moved
    assert {name for name in transformer.visual_tensors() if ".visual." in name} <= moved


def test_a_few_steps_learn_to_refine(build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]) -> None:
    """High codes are a function of the low code and the place inside it, which a start at zero must find."""
    transformer = build_tiny(**{**pocket, "max_grid": 8}, low_input=True)
    transformer.low_projection.weight.data.zero_()
    prefixes = read_prefixes(transformer, [[1]] * 16)
    low = torch.randint(8, (16, 2, 2))
    high = low.repeat_interleave(2, 1).repeat_interleave(2, 2) * 4 + torch.tensor([[0, 1], [2, 3]]).repeat(2, 2)
    trained = list(transformer.visual_tensors().values())
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = upscale_loss(transformer, low, high, prefixes, side=2)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 < 4 < losses[0]


def test_grids_that_do_not_fit_are_one_line(transformer: MarsTransformer) -> None:
    prefixes = read_prefixes(transformer, ROWS)
    with pytest.raises(ConfigError, match="must fill the grid, got 2x4"):
        upscale_loss(transformer, LOW, LOW, prefixes, side=4)
    with pytest.raises(ConfigError, match="a whole number of times the low one, got 2x4 for 4x8"):
        upscale_loss(transformer, HIGH, LOW, prefixes, side=1)
