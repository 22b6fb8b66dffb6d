import pytest

from mars.data.scene_outlines import OUTLINES
from mars.data.scene_words import ALL_SHAPES


@pytest.mark.parametrize("shape", OUTLINES)
def test_an_outline_fills_the_unit_square(shape: str) -> None:
    for along in zip(*OUTLINES[shape], strict=True):
        assert (min(along), max(along)) == pytest.approx((0, 1))


def test_every_shape_but_round_ones_has_an_outline() -> None:
    assert ALL_SHAPES.keys() - OUTLINES.keys() == {"circle", "ring"}
    assert OUTLINES.keys() < ALL_SHAPES.keys()
