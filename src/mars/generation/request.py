"""What can be asked of the engine: one picture's codes. Knows neither pixels nor strings.

Letters: R rows, C columns, N = R * C codes, K codes of a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import drawing_order, refined_codes

SEED_STRIDE = 0x1E3779B97F4A7C15
"""Between the seeds of the candidates of one request."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """One image to draw, or (with `low`) to draw again at a higher resolution, K = side * side codes a step.

    The latter is our own design, not the paper's; `sequence/layout.py` says which codes a step draws.
    """

    prompt: tuple[int, ...]
    """Text ids, with the beginning-of-text id."""
    free: tuple[int, ...]
    """What guidance moves away from: the text ids of the empty (or negative) prompt."""
    grid: tuple[int, int]
    """Rows and columns of codes."""
    seed: int
    sampling: Sampling
    low: Tensor | None = None
    """(R, C) codes of the smaller image that is drawn again; the grid is a whole number of times larger."""
    prior: Tensor | None = None
    """(R, C, V) what is added to the logits of each code: what is known of the picture beside prompt and `low`."""
    side: int = 1
    """Codes on each side of the square that a step draws."""
    cell: int = 1
    """Codes on each side of the square that one position holds (`Vocabulary.cell`); it divides `side`."""
    known: Tensor | None = None
    """(R, C) codes that are kept as they are, and -1 where one is to be drawn: inpainting. What stands behind a place
    is not seen when it is drawn, but counts where the likeliest of several candidates is chosen."""

    @property
    def guided(self) -> int:
        """How many codes are guided: so many of the first in the order of drawing."""
        return 0 if self.sampling.guidance == 1 else round(self.sampling.guidance_stop * self.places)

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        """The text of each row that a candidate starts with: the prompt, and where it is guided the free text."""
        return (self.prompt, self.free) if self.guided else (self.prompt,)

    @property
    def places(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Positions of a candidate's longest row."""
        return (
            max(map(len, self.texts))
            + (0 if self.low is None else self.low.numel() // self.cell**2 + 1)
            + self.places // self.cell**2
            + self.sampling.window
            - 1
        )

    def candidate_seed(self, number: int) -> int:
        """The seed of a candidate; the first has the request's own."""
        return (self.seed + number * SEED_STRIDE) % 2**63

    def order(self) -> Tensor:
        """Raster places (N,) of the codes in the order in which they are drawn.

        Raises:
            ConfigError: if blocks do not fill the grid.
        """
        return drawing_order(*self.grid, side=self.side, cell=self.cell)

    def refined(self) -> Tensor | None:
        """The code that each code refines, (N,) in the order in which they are drawn; null without `low`.

        Raises:
            ConfigError: if the grid is not a whole number of times larger than `low`, or blocks do not fill it.
        """
        if self.low is None:
            return None
        return refined_codes(self.low[None], grid=self.grid).flatten()[self.order().to(self.low.device)]

    def raster(self, codes: Tensor) -> Tensor:
        """Codes in the order in which they are drawn, of some whole rows (R * C,), to a grid (R, C)."""
        grid = torch.empty_like(codes)
        grid[self.order()[: len(codes)].to(codes.device)] = codes
        return grid.view(-1, self.grid[1])

    def check(self, transformer: MarsTransformer) -> None:
        """Raises RequestError or ConfigError if a model cannot draw this."""
        if self.cell != transformer.vocabulary.cell:
            raise RequestError(
                f"cell must be the model's, {transformer.vocabulary.cell}, got {self.cell}; ask as this model draws"
            )
        self.order()
        self.refined()
        if self.low is not None:
            self._check_cells(self.low)
        if self.low is not None and not transformer.config.semvie.low_input:
            raise RequestError(
                "the model must have been trained to upscale (semvie.low_input), and was not; open another"
            )
        if self.known is not None and (
            self.known.shape != self.grid or int(self.known.max()) >= transformer.vocabulary.num_codes
        ):
            raise RequestError(
                f"known codes must fill a grid of {self.grid[0]}x{self.grid[1]} and be below "
                f"{transformer.vocabulary.num_codes}, got {'x'.join(map(str, self.known.shape))} up to "
                f"{int(self.known.max())}"
            )
        if self.prior is not None and self.prior.shape != (*self.grid, transformer.vocabulary.num_codes):
            raise RequestError(
                f"the prior must have the shape {(*self.grid, transformer.vocabulary.num_codes)}, "
                f"got {tuple(self.prior.shape)}"
            )
        if self.sampling.window != 1 and (self.low is not None or self.side > 1):
            raise RequestError(
                f"window must be 1 where a step draws several codes or refines a picture, got {self.sampling.window}"
            )
        limit = transformer.config.language.max_positions
        if self.length > limit:
            raise RequestError(
                f"prompt and image must fit into {limit} positions, got {self.length}; shorten the prompt"
            )

    def _check_cells(self, low: Tensor) -> None:
        """Raises RequestError unless cells fill what is refined, and refine one code each."""
        rows, columns = low.shape
        if rows % self.cell or columns % self.cell or self.grid[0] // rows % self.cell:
            raise RequestError(
                f"cells of {self.cell}x{self.cell} codes must fill what is refined, and refine one code each, got "
                f"{rows}x{columns} codes for {self.grid[0]}x{self.grid[1]}"
            )
