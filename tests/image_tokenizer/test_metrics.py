import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mars.image_tokenizer.metrics import codebook_statistics, psnr


@pytest.mark.parametrize(("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (0.5, 20 * math.log10(2)), (0.0, 100.0)])
def test_a_constant_error_gives_its_ratio_in_decibels(error: float, decibels: float) -> None:
    targets = torch.zeros(2, 3, 4, 5)
    torch.testing.assert_close(psnr(targets + error, targets), torch.full((2,), decibels), atol=1e-4, rtol=0)


def test_each_picture_has_its_own_ratio() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1] = 0.1
    torch.testing.assert_close(psnr(images, torch.zeros_like(images)), torch.tensor([100.0, 20.0]))


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 5))
def test_codes_in_equal_use_have_their_number_as_perplexity(used: int, unused: int, each: int) -> None:
    codes = torch.arange(used).repeat(each)[None]
    found = codebook_statistics(codes, used + unused)
    assert found["usage"] == pytest.approx(used / (used + unused))
    assert found["perplexity"] == pytest.approx(used)


def test_unequal_use_lowers_the_perplexity() -> None:
    found = codebook_statistics(torch.tensor([0, 0, 0, 1]), 4)
    assert found["usage"] == 0.5
    assert found["perplexity"] == pytest.approx(4 / 27**0.25 * 1.0)  # exp(3/4 ln(4/3) + 1/4 ln 4)
