import pytest

from mars.errors import RequestError
from mars.pipeline.checks import all_seeds, find_grid

SIZES = [(48, 32), (64, 64)]


def test_a_seed_counts_up_within_each_prompt() -> None:
    assert all_seeds(5, prompts=2, n=3) == [5, 6, 7, 5, 6, 7]
    assert all_seeds([9, 1], prompts=1, n=2) == [9, 1]
    drawn = all_seeds(None, prompts=2, n=2)
    assert drawn == [drawn[0], drawn[0] + 1] * 2
    assert all_seeds(None, prompts=1, n=1) != all_seeds(None, prompts=1, n=1)


def test_a_size_is_one_that_was_trained() -> None:
    assert find_grid(None, None, sizes=SIZES, factor=16) == (2, 3)
    assert find_grid(64, 64, sizes=SIZES, factor=16) == (4, 4)
    with pytest.raises(RequestError, match=r"the model was trained on \(48x32, 64x64\), got 64x32"):
        find_grid(64, None, sizes=SIZES, factor=16)
