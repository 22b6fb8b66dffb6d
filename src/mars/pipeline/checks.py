"""Numbers of a request: its seeds, and the code grid of its size; and whether a device can draw."""

import secrets
from collections.abc import Sequence

import torch

from mars.errors import RequestError
from mars.model.precision import Precision, is_rounded


def all_seeds(seed: int | Sequence[int] | None, *, prompts: int, n: int) -> list[int]:
    """A seed per picture: those given, or for each prompt one that counts up, drawn at random where none is given.

    Raises:
        RequestError: if there are too few or too many, or one is out of range.
    """
    if seed is None or isinstance(seed, int):
        first = secrets.randbelow(2**32) if seed is None else seed
        seeds = [first + index for _ in range(prompts) for index in range(n)]
    else:
        seeds = list(seed)
    if len(seeds) != prompts * n:
        raise RequestError(f"there must be one seed, or one per picture ({prompts * n}), got {len(seeds)}")
    for number in seeds:
        if not 0 <= number < 2**63:
            raise RequestError(f"seed must lie in 0..2**63 - 1, got {number}")
    return seeds


def find_grid(
    width: int | None, height: int | None, *, sizes: Sequence[tuple[int, int]], factor: int
) -> tuple[int, int]:
    """Rows and columns of the code grid for a size in pixels; where a side is not given, it is that of the first size.

    Args:
        sizes: (width, height) that the model was trained on.
        factor: pixels on each side of a code.

    Raises:
        RequestError: if the size is none of those.
    """
    wanted = (sizes[0][0] if width is None else width, sizes[0][1] if height is None else height)
    trained = ", ".join(f"{one}x{other}" for one, other in sizes)
    for name, side in zip(("width", "height"), wanted, strict=True):
        if side % factor or side < factor:
            raise RequestError(f"{name} must be a multiple of {factor}, got {side}; trained sizes are {trained}")
    if wanted not in sizes:
        raise RequestError(f"size must be one that the model was trained on ({trained}), got {wanted[0]}x{wanted[1]}")
    return wanted[1] // factor, wanted[0] // factor


def check_device(device: str | torch.device, *, precision: Precision) -> None:
    """Raises RequestError if PyTorch has no such device here, or weights of this precision must stay on the CPU."""
    if is_rounded(precision):
        raise RequestError(f"weights in {precision} stay on the CPU; open the model in fp32 or fp16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("\n")[0]
        raise RequestError(f"the device must be one of PyTorch's here, got {device} ({said})") from None
