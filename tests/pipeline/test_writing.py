import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mars.errors import PromptError, RequestError
from mars.generation.engine import text_ids
from mars.generation.sampling import Sampling
from mars.picture import GeneratedImage
from mars.pipeline import MarsPipeline
from mars.pipeline.writing import HalfDrawn, Painted, Words

LIKELIEST = Sampling(temperature=0)


@pytest.fixture(scope="module")
def painter(tiny_model: Path) -> MarsPipeline:
    """A model that begins an image where the second id of what it would write after "red" stands."""
    pipe = MarsPipeline.from_pretrained(tiny_model)
    transformer = pipe.model.transformer
    with torch.no_grad():
        second = list(text_ids(transformer, pipe.prompt_ids("red"), max_tokens=2, end=()))[1]
        transformer.special_head.weight[0] = 1.2 * transformer.text_table[second]
    return pipe


def test_text_and_pictures_come_in_turns(painter: MarsPipeline) -> None:
    pieces = list(painter.write("red", seed=4, max_tokens=12, max_images=2, drawing=LIKELIEST, previews=True))
    kinds = [type(piece) for piece in pieces]
    assert 1 <= kinds.count(Painted) <= 2
    assert kinds.count(HalfDrawn) == kinds.count(Painted)  # a picture has two rows
    first = pieces[kinds.index(Painted)]
    assert isinstance(first, Painted)
    assert isinstance(first.image, GeneratedImage)
    assert first.image.size == (48, 32)
    assert first.image.info["seed"] == "4"
    assert "joint" in json.loads(first.image.info["settings"])
    again = list(painter.write("red", seed=4, max_tokens=12, max_images=2, drawing=LIKELIEST))
    assert [type(piece) for piece in again] == [kind for kind in kinds if kind is not HalfDrawn]
    assert [piece.text for piece in again if isinstance(piece, Words)] == [
        piece.text for piece in pieces if isinstance(piece, Words)
    ]


def test_it_goes_on_from_pictures(painter: MarsPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")

    def words(*parts: str | Path | Image.Image) -> str:
        pieces = painter.write(list(parts), max_tokens=10, max_images=0)
        return "".join(piece.text for piece in pieces if isinstance(piece, Words))

    assert words("a", tmp_path / "red.png") == words("a", Image.new("RGB", (48, 32), "red"))
    assert words("a", tmp_path / "red.png", "b") != words("a", "b")


def test_what_cannot_be_written_is_one_line(painter: MarsPipeline) -> None:
    for parts in ("", "  ", [], [Image.new("RGB", (48, 32))]):
        with pytest.raises(PromptError, match="there must be a text to begin with; say something"):
            painter.write(parts)
    with pytest.raises(RequestError, match="ask for fewer tokens or images"):
        painter.write("red", max_tokens=100_000)
