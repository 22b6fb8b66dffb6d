import math
import warnings
from typing import Any

import pytest
import torch

from mars.errors import ConfigError
from mars.model.config import RopeScaling
from mars.model.rope import Rotary, rotary_periods, rotate


def test_rotary_positions_turn_pairs_as_complex_numbers() -> None:
    rotary = Rotary(8, theta=100.0)
    positions = torch.tensor([[0, 1, 5], [3, 2, 700]])
    x = torch.randn(2, 4, 3, 8)
    turned = rotate(x, rotary.at(positions, longest=701, dtype=torch.float32))
    speeds = 100.0 ** -(torch.arange(4) / 4)
    angles = positions[:, None, :, None] * speeds
    wanted = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([wanted.real, wanted.imag], dim=-1), atol=1e-4, rtol=1e-4)


def test_rotated_products_depend_on_distance_only() -> None:
    rotary = Rotary(8, theta=100.0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i: int, j: int) -> torch.Tensor:
        turned = [
            rotate(x, rotary.at(torch.tensor([[at]]), longest=64, dtype=torch.float32)) for x, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(50, 45))


def test_a_rotary_table_made_without_gradients_serves_training() -> None:
    rotary = Rotary(8, theta=100.0)
    positions = torch.tensor([[0, 1]])
    with torch.inference_mode():
        rotary.at(positions, longest=2, dtype=torch.float32)
    x = torch.randn(1, 1, 2, 8, requires_grad=True)
    rotate(x, rotary.at(positions, longest=2, dtype=torch.float32)).sum().backward()
    assert x.grad is not None


LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_positions=64, low_frequency=1.0, high_frequency=4.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_positions=64, attention_factor=0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("scaling", "fields"),
    [
        (RopeScaling(kind="linear", factor=2.5), {"rope_type": "linear", "factor": 2.5}),
        (LLAMA3, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0}),
        (
            RopeScaling(
                kind="yarn", factor=3.0, original_positions=64, attention_factor=1.5, beta_fast=8.0, beta_slow=2.0,
                truncate=False,
            ),
            {
                "rope_type": "yarn", "factor": 3.0, "attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0,
                "truncate": False,
            },
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("head_width", "theta"), [(32, 1e4), (128, 5e5)])
def test_scaled_frequencies_are_those_of_transformers(
    scaling: RopeScaling, fields: dict[str, Any], head_width: int, theta: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        original = {} if fields["rope_type"] == "linear" else {"original_max_position_embeddings": 64}
        config = LlamaConfig(
            hidden_size=2 * head_width, num_attention_heads=2, max_position_embeddings=512,
            rope_parameters=fields | original | {"rope_theta": theta},
        )  # fmt: skip
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
    periods = rotary_periods(head_width, theta=theta, scaling=scaling)
    torch.testing.assert_close(1 / periods, frequencies, rtol=1e-6, atol=0)
    assert not torch.allclose(periods, rotary_periods(head_width, theta=theta))
    assert scaling.attention_factor == pytest.approx(attention_factor)


def test_factors_divide_frequencies_one_by_one() -> None:
    factors = tuple(8 / kept for kept in (8.0, 3.0, 1.0, 1.0))
    found = rotary_periods(8, theta=100.0, scaling=RopeScaling(kind="factors", factors=factors))
    torch.testing.assert_close(found, rotary_periods(8, theta=100.0) * torch.tensor(factors))


def test_attention_of_yarn_is_sharper_by_the_square_of_its_factor() -> None:
    q, k, at = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32), torch.tensor([[5]])
    scaled = Rotary(32, theta=1e4, scaling=YARN).at(at, longest=6, dtype=torch.float32)
    product = (rotate(q, scaled) * rotate(k, scaled)).sum()
    torch.testing.assert_close(product, (q * k).sum() * YARN.attention_factor**2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear", "factor": 0.0}, "rope_scaling.factor must be greater than 0, got 0.0"),
        ({"kind": "yarn", "factor": 2.0}, "rope_scaling.original_positions must be greater than 0, got 0"),
        ({"kind": "factors", "factors": (1.0, math.nan)}, r"rope_scaling.factors\[1\] must be greater than 0"),
        ({"kind": "llama3", "original_positions": 8, "high_frequency": 1.0}, "high_frequency must be greater than low"),
    ],
)
def test_a_scaling_that_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**fields)
