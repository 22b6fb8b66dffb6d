from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mars.data.curation.config import ScorerConfig
from mars.data.curation.scorers import Colourfulness, Scorer, Sharpness, open_scorer
from mars.errors import ConfigError
from tests.data.conftest import art

HERE = "mars.data.curation.scorers"


def scores(scorer: Scorer, *images: Image.Image) -> list[float | None]:
    return scorer.score(images, [()] * len(images))


def test_colourfulness_is_that_of_the_paper() -> None:
    # Half pure red, half pure green: rg is +-255 and yb is 127.5 everywhere, so std is 255 and 0, mean 0 and 127.5.
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4, :, 0], pixels[4:, :, 1] = 255, 255
    assert scores(Colourfulness(), Image.fromarray(pixels)) == [pytest.approx(255 + 0.3 * 127.5)]


def test_grey_has_no_colour_and_colour_grows_with_saturation(noise: Callable[[int], Image.Image]) -> None:
    image = art(1)
    half = Image.blend(image.convert("L").convert("RGB"), image, 0.5)
    grey, some, much = scores(Colourfulness(), noise(1), half, image)
    assert grey == 0
    assert some is not None
    assert much is not None
    assert 0 < some < much


def test_blur_lowers_sharpness_and_nothing_is_0(noise: Callable[[int], Image.Image]) -> None:
    image = noise(1)
    empty, blurred, sharp = scores(Sharpness(), Image.new("RGB", (64, 64)), image.filter(ImageFilter.BoxBlur(3)), image)
    assert empty == 0
    assert blurred is not None
    assert sharp is not None
    assert 0 < blurred < sharp / 2


def test_a_picture_too_small_for_sharpness_is_not_judged() -> None:
    assert scores(Sharpness(), Image.new("L", (2, 9))) == [None]


def test_a_scorer_is_opened_by_its_name() -> None:
    assert isinstance(open_scorer(ScorerConfig(scorer=f"{HERE}:Sharpness")), Sharpness)


class Constant:
    """A scorer of somebody else."""

    digest = ""

    def __init__(self, *, value: float, name: str = "constant") -> None:
        self.name, self.value = name, value

    def score(self, images: Sequence[Image.Image], captions: Sequence[object]) -> list[float | None]:
        return [self.value] * len(images)


def test_a_class_of_ones_own_takes_its_options() -> None:
    scorer = open_scorer(ScorerConfig(scorer=f"{__name__}:Constant", options={"value": 2.5, "name": "mine"}))
    assert scorer.name == "mine"
    assert scores(scorer, art(1), art(2)) == [2.5, 2.5]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("no_such_module:A", {}, "PYTHONPATH"),
        (f"{HERE}:Missing", {}, "must hold the scorer Missing"),
        (f"{HERE}:Sharpness", {"side": 3}, "does not take these options"),
        (f"{HERE}:open_scorer", {}, "does not take these options"),
        ("pathlib:Path", {}, "must have a name, a digest of its weights .* and a method score"),
    ],
)
def test_what_is_no_scorer_is_refused(name: str, options: dict[str, str | bool | int | float], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        open_scorer(ScorerConfig(scorer=name, options=options))
    assert "\n" not in str(caught.value)
