"""How far a set of pictures is from another set, by features of a network: FID and KID, computed by torchmetrics.

A figure means something only beside the name of its network and the numbers of pictures, and so these are reported with
it. Letters: N, M pictures, D features.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mars.errors import DataError, ModelError
from mars.evaluation.features import PACKAGE, EfficientNetLite0

BUNDLED = "package:efficientnet-lite0"
BATCH = 16
KID_SUBSETS, KID_SUBSET_SIZE = 100, 100

Network = Callable[[Tensor], Tensor]
"""Images (B, 3, height, width) as bytes to features (B, D)."""


def open_network(name: str) -> Network:
    """A network by its name in a configuration.

    Args:
        name: `package:efficientnet-lite0`; or a folder with a CLIP in the hub's layout; or a TorchScript file that is
            called with bytes and `return_features=True`, as the Inception of StyleGAN's FID is.

    Raises:
        ModelError: if there is none, or it cannot be opened.
    """
    if name == BUNDLED:
        network = EfficientNetLite0()
        return torch.inference_mode()(lambda images: network.pooled(images.float() / 255))
    path = Path(name)
    if path.is_dir():
        from mars.data.curation.clip import Clip

        clip = Clip(path)
        return lambda images: clip.images([Image.fromarray(one) for one in images.permute(0, 2, 3, 1).numpy()])
    try:
        script = torch.jit.load(name, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"features must be {BUNDLED}, a CLIP's folder or a TorchScript file, got {name} ({_first_line(error)})"
        ) from None
    return torch.inference_mode()(lambda images: script(images, return_features=True))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def described(name: str) -> str:
    """A network's name as reports give it, with its version where it has one; of a path only the last part."""
    return PACKAGE if name == BUNDLED else Path(name).name


def features_of(network: Network, pictures: Sequence[Image.Image]) -> Tensor:
    """Features (N, D) of pictures of one size, at least one."""
    chunks = []
    for start in range(0, len(pictures), BATCH):
        pixels = [np.asarray(one.convert("RGB")) for one in pictures[start : start + BATCH]]
        chunks.append(network(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).float())
    return torch.cat(chunks)


class _Given(nn.Module):
    """Stands where torchmetrics expects a network, and passes features on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features_ND: Tensor) -> Tensor:
        return features_ND


def distances(true_ND: Tensor, other_MD: Tensor, *, seed: int) -> dict[str, Any]:
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018; mean and deviation over random subsets) of two sets.

    FID of fewer pictures than features is far too large, by as much for any set of that size.

    Raises:
        DataError: if a set has fewer than two pictures.
    """
    if min(len(true_ND), len(other_MD)) < 2:
        raise DataError(f"FID and KID need at least 2 pictures of each kind, got {len(true_ND)} and {len(other_MD)}")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given, size = _Given(true_ND.shape[1]), min(KID_SUBSET_SIZE, len(true_ND), len(other_MD))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that KID keeps all features
        torch.manual_seed(seed)
        fid = FrechetInceptionDistance(feature=given)
        kid = KernelInceptionDistance(feature=given, subsets=KID_SUBSETS, subset_size=size)
        for metric in (fid, kid):
            metric.update(true_ND, real=True)
            metric.update(other_MD, real=False)
        mean, deviation = kid.compute()
        return {
            "pictures": len(other_MD),
            "fid": float(fid.compute()),
            "kid": float(mean),
            "kid_deviation": float(deviation),
        }
