"""How faithful a reconstruction is, and how much of the codebook is in use."""

import math

import torch
from torch import Tensor


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,), for (B, 3, height, width) in 0..1."""
    error_B = (images - targets).square().flatten(1).mean(dim=1).clamp(min=1e-10)
    return -10 * torch.log10(error_B)


def codebook_statistics(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Share of codes that occur at all (`usage`), and the exponential of the entropy of their use (`perplexity`)."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * shares.log()).sum())
    return {"usage": float((counts > 0).double().mean()), "perplexity": math.exp(entropy)}
