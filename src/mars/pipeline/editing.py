"""Part of a picture drawn anew: inpainting, outpainting and variations, all by keeping the codes of the rest.

A code is drawn after those above and to the left of it, so what stands below or to the right of a hole is not seen;
of several candidates, the one with which it goes together best is kept.

Letters: R rows, C columns of codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.picture import on_white_page, open_picture
from mars.pipeline.orders import DEFAULT_SAMPLING, Order, draw_order
from mars.pipeline.scoring import Scorer

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

SEAM = 2
"""Pixels over which what is kept and what is new are mixed."""
MOST_MARGIN = 4096

Margins = tuple[int, int, int, int]
"""Pixels to the left, above, to the right and below."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The pixels of a picture that stay as they were."""

    page: Image.Image
    mask: Image.Image
    """White where the picture is drawn anew."""

    def __call__(self, drawn: Image.Image) -> Image.Image:
        """A drawn picture with the pixels that are kept in their places."""
        soft = ImageChops.lighter(self.mask, self.mask.filter(ImageFilter.GaussianBlur(SEAM)))
        return Image.composite(drawn, self.page, soft)


def edit_order(
    pipe: "MarsPipeline",
    picture: str | Path | Image.Image,
    prompt: str = "",
    *,
    mask: str | Path | Image.Image | None = None,
    margins: Margins | None = None,
    vary: float | None = None,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    negative_prompt: str = "",
    sampling: Sampling = DEFAULT_SAMPLING,
    scorer: Scorer | None = None,
) -> Order:
    """Pictures to draw anew in part; arguments and errors are those of `MarsPipeline.edit`."""
    if sum(given is not None for given in (mask, margins, vary)) != 1:
        raise RequestError("an edit needs a mask, or margins, or a share to vary; give one of them")
    width, height = pipe.sizes[0]
    opened = open_picture(Path(picture)) if isinstance(picture, str | Path) else picture
    order = draw_order(
        pipe, prompt, n=n, seed=seed, width=width, height=height, negative_prompt=negative_prompt, sampling=sampling,
        scorer=scorer, empty=True,
    )  # fmt: skip
    hole: Image.Image | None = None
    how: dict[str, Any] = dict(order.settings[0])
    if vary is not None:
        if not 0 < vary <= 1:
            raise RequestError(f"a share to vary must lie in 0..1 and be greater than 0, got {vary}")
        how["vary"] = vary
    elif margins is not None:
        opened, hole = with_margins(opened, margins)
        how["margins"] = list(margins)
    else:
        assert mask is not None
        hole = read_mask(open_picture(Path(mask)) if isinstance(mask, str | Path) else mask, size=opened.size)
        how["mask"] = True
    page = on_white_page(opened, size=(width, height))
    codes = pipe.encode(page)
    if hole is None:
        assert vary is not None
        holes = [varied_cells(codes, share=vary, seed=number) for number in order.seeds]
        return replace(order, requests=_with_holes(order, codes, holes), settings=[{"edit": how}] * len(holes))
    hole = on_black_page(hole, size=(width, height))
    cells = mask_cells(hole, grid=(codes.shape[0], codes.shape[1]))
    return replace(
        order,
        requests=_with_holes(order, codes, [cells] * len(order.requests)),
        settings=[{"edit": how}] * len(order.requests),
        keep=Kept(page=page, mask=hole),
    )


def _with_holes(order: Order, codes: Tensor, holes: Sequence[Tensor]) -> list[Any]:
    return [replace(request, known=codes.where(~hole, -1)) for request, hole in zip(order.requests, holes, strict=True)]


def read_mask(mask: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """A mask in black and white: white, or transparent where it has transparency, is drawn anew.

    Raises:
        RequestError: if it has another size than the picture, or nothing is to be drawn.
    """
    if mask.size != size:
        raise RequestError(
            f"the mask must have the picture's size, {size[0]}x{size[1]} pixels, got {mask.width}x{mask.height}"
        )
    alpha = mask.getchannel("A") if "A" in mask.getbands() else None
    if alpha is not None and alpha.getextrema()[0] < 128:  # type: ignore[operator]
        hole = ImageChops.invert(alpha)
    else:
        hole = mask.convert("L")
    hole = hole.point(lambda value: 255 if value >= 128 else 0)
    if hole.getbbox() is None:
        raise RequestError("the mask must be white (or transparent) where the picture is drawn anew; nothing is")
    return hole


def with_margins(picture: Image.Image, margins: Margins) -> tuple[Image.Image, Image.Image]:
    """A picture with empty margins around it, and the mask of these.

    Raises:
        RequestError: if no margin is greater than 0, or one cannot be.
    """
    left, above, right, below = margins
    if min(margins) < 0 or max(margins) == 0 or max(margins) > MOST_MARGIN:
        raise RequestError(f"margins must be 0 to {MOST_MARGIN} pixels, one of them more than 0, got {margins}")
    size = picture.width + left + right, picture.height + above + below
    page, mask = Image.new("RGB", size, "white"), Image.new("L", size, 255)
    page.paste(on_white_page(picture, size=picture.size), (left, above))
    mask.paste(0, (left, above, left + picture.width, above + picture.height))
    return page, mask


def read_margins(text: str) -> Margins:
    """One number for all sides, or four with commas in between.

    Raises:
        RequestError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (1, 4) or not all(part.isdecimal() for part in parts):
        raise RequestError(f"margins must be a number of pixels, or four (left,above,right,below), got {text!r}")
    left, above, right, below = map(int, parts * 4 if len(parts) == 1 else parts)
    return left, above, right, below


def on_black_page(mask: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """A mask fitted onto a page as `on_white_page` fits its picture; what it does not cover is kept."""
    white = on_white_page(ImageChops.invert(mask).convert("RGB"), size=size).convert("L")
    return ImageChops.invert(white).point(lambda value: 255 if value >= 128 else 0)


def mask_cells(mask: Image.Image, *, grid: tuple[int, int]) -> Tensor:
    """Codes (R, C) that are drawn anew: those of which any pixel is white."""
    rows, columns = grid
    pixels = np.asarray(mask) > 127
    cells = pixels.reshape(rows, mask.height // rows, columns, mask.width // columns).any(axis=(1, 3))
    return torch.from_numpy(cells)


def varied_cells(codes: Tensor, *, share: float, seed: int) -> Tensor:
    """A share of all codes (R, C), at least one, chosen by a seed."""
    order = torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(seed))
    return (order < max(1, round(share * codes.numel()))).view_as(codes)
