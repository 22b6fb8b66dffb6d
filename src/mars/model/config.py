"""The shapes of a MARS transformer: the language model that it is built on, and its visual expert."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from mars.errors import ConfigError


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:  # NaN is not
            raise ConfigError(f"{owner}.{name} must be greater than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies were changed so that an LLM reads longer texts; the formulas are in `model/rope.py`."""

    kind: Literal["linear", "llama3", "yarn", "factors"]
    """`linear`: all positions are divided. `llama3`: only the slow frequencies are. `yarn`: as Peng et al. 2023.
    `factors`: every frequency has a factor of its own, as a GGUF file says it."""
    factor: float = 1.0
    """How many times longer the texts are."""
    original_positions: int = 0
    """Positions before the change (`llama3`, `yarn`)."""
    low_frequency: float = 1.0
    """`llama3`: what turns less often than this within the original positions is divided."""
    high_frequency: float = 4.0
    """`llama3`: what turns more often than this is left alone."""
    beta_fast: float = 32.0
    """`yarn`: what turns more often than this is left alone."""
    beta_slow: float = 1.0
    """`yarn`: what turns less often than this is divided."""
    truncate: bool = True
    """`yarn`: whether the two limits are rounded to whole channels."""
    attention_factor: float = 1.0
    """`yarn`: cosines and sines are multiplied by it, and so attention's scores by its square."""
    factors: tuple[float, ...] = ()
    """`factors`: what each frequency is divided by, fastest first."""

    def __post_init__(self) -> None:
        _positive(
            "rope_scaling",
            factor=self.factor,
            attention_factor=self.attention_factor,
            beta_slow=self.beta_slow,
            low_frequency=self.low_frequency,
            **{f"factors[{index}]": value for index, value in enumerate(self.factors)},
        )
        if self.kind in ("llama3", "yarn"):
            _positive("rope_scaling", original_positions=self.original_positions)
        for slow, fast in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            if not getattr(self, fast) > getattr(self, slow):
                raise ConfigError(
                    f"rope_scaling.{fast} must be greater than {slow}, got {getattr(self, fast)} and "
                    f"{getattr(self, slow)}"
                )


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The frozen decoder LLM: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int
    """Rows of the LLM's embedding table, padding rows included."""
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn: int
    """Width inside the feed-forward layers."""
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    """Whether the output head is the embedding table."""
    qkv_bias: bool = False
    """Qwen1 and Qwen2 add a bias to the query, key and value projections."""
    qk_norm: bool = False
    """Qwen3 normalises queries and keys per head."""
    rope_scaling: RopeScaling | None = None
    """Null where rotary frequencies are those of `rope_theta` alone."""

    def __post_init__(self) -> None:
        _positive(
            "language",
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            ffn=self.ffn,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            max_positions=self.max_positions,
        )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"language.num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ConfigError(f"language.head_width must be even for rotary positions, got {self.head_width}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_width // 2:
            raise ConfigError(
                f"language.rope_scaling.factors must be {self.head_width // 2} for heads of {self.head_width}, "
                f"got {len(scaling.factors)}"
            )


@dataclass(frozen=True, kw_only=True)
class SemVIEConfig:
    """The visual expert (Semantic Vision-Language Integration Expert, arXiv 2407.07614); defaults are the paper's."""

    share_norms: bool = True
    """One frozen norm before each router, as in the paper's figure; false gives the visual expert its own."""
    duplicate_output: bool = True
    """Whether attention's output projection is also duplicated (the paper leaves it open)."""
    visual_width: int | None = None
    """Width of the visual residual stream; null is the LLM's. Heads and head width always match the LLM's."""
    visual_ffn: int | None = None
    """Width inside the visual feed-forward layers; null is the LLM's."""
    visual_layers: tuple[int, ...] | None = None
    """Which layers have a visual expert; null is all. Image positions skip the others."""
    init: str = "copy"
    """`copy` starts the visual expert from the LLM's weights (needs equal widths), `random` does not."""
    head_norms: bool = False
    """Ours: norms of the visual expert's queries, keys and values per head, started at the scale of the text's. The
    values of a trained LLM are small; beside larger ones of images, the prompt would hardly be heard."""
    grid_embedding: bool = False
    """Ours: learned row and column embeddings added at image positions. A pocket model learns its grid sooner."""
    max_grid: int = 32
    """Largest number of rows or of columns that the grid embedding knows."""
    cell: int = 1
    """Ours: codes on each side of the square that one image position holds; 1 is a code per position. With 2 a picture
    takes a quarter of the positions, and a small head (`model/cells.py`) predicts the four codes of each in turn."""
    cell_width: int = 256
    """Width of that head."""
    low_input: bool = False
    """Ours: an image position may also get the low-resolution code that it refines, through a projection that starts
    at zero. Super-resolution needs it."""

    def __post_init__(self) -> None:
        if self.init not in ("copy", "random"):
            raise ConfigError(f"semvie.init must be 'copy' or 'random', got {self.init!r}")
        _positive("semvie", max_grid=self.max_grid, cell=self.cell, cell_width=self.cell_width)
        for name in ("visual_width", "visual_ffn"):
            value = getattr(self, name)
            if value is not None:
                _positive("semvie", **{name: value})
        if self.visual_layers is not None and not self.visual_layers:
            raise ConfigError("semvie.visual_layers must name at least one layer, got none; leave it out for all")

    def check_grid(self, rows: int, columns: int) -> None:
        """Raises ConfigError for a grid of codes that cells do not fill, or that the grid embedding does not know."""
        if rows % self.cell or columns % self.cell:
            raise ConfigError(f"cells of {self.cell}x{self.cell} codes must fill the grid, got {rows}x{columns}")
        if self.grid_embedding and max(rows, columns) > self.max_grid * self.cell:
            raise ConfigError(
                f"semvie.max_grid must be at least {-(-max(rows, columns) // self.cell)} for codes of "
                f"{rows}x{columns}, got {self.max_grid}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole MARS transformer."""

    language: LanguageConfig
    semvie: SemVIEConfig = field(default_factory=SemVIEConfig)
    num_codes: int = 8192
    """Size of the image tokenizer's codebook."""

    def __post_init__(self) -> None:
        _positive("model", num_codes=self.num_codes)
        language, semvie = self.language, self.semvie
        for layer in semvie.visual_layers or ():
            if not 0 <= layer < language.num_layers:
                raise ConfigError(f"semvie.visual_layers must lie in 0..{language.num_layers - 1}, got {layer}")
        if semvie.cell > 1 and semvie.init == "copy":
            raise ConfigError("semvie.cell above 1 has no rows that could be copied; set init = 'random'")
        if self.visual_width != language.width:
            if semvie.share_norms:
                raise ConfigError(
                    f"semvie.share_norms needs visual_width {language.width} (the LLM's), got {self.visual_width}; "
                    "set share_norms = false"
                )
            if not semvie.duplicate_output:
                raise ConfigError(
                    f"semvie.duplicate_output = false needs visual_width {language.width}, got {self.visual_width}"
                )
        narrow = self.visual_width != language.width or self.visual_ffn != language.ffn
        if semvie.head_norms and semvie.init == "copy":
            raise ConfigError("semvie.head_norms changes what copied weights mean; set init = 'random'")
        if narrow and semvie.init == "copy":
            raise ConfigError("semvie.init = 'copy' needs the LLM's widths; set init = 'random' for a narrower expert")

    @property
    def visual_width(self) -> int:
        """Width of the visual residual stream."""
        return self.semvie.visual_width or self.language.width

    @property
    def visual_ffn(self) -> int:
        """Width inside the visual feed-forward layers."""
        return self.semvie.visual_ffn or self.language.ffn

    @property
    def visual_layers(self) -> tuple[int, ...]:
        """The layers that have a visual expert, in order."""
        if self.semvie.visual_layers is None:
            return tuple(range(self.language.num_layers))
        return tuple(sorted(set(self.semvie.visual_layers)))


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """How a model was trained to draw its grids again, larger (ours: `sequence/layout.py`). It changes no weights."""

    scale: int = 2
    """How many times as many rows and columns are drawn."""
    codes_per_step: int = 4
    """K: 1 is next-token prediction, 4 and 16 are blocks of 2x2 and 4x4 codes."""

    def __post_init__(self) -> None:
        if self.scale < 2:
            raise ConfigError(f"upscale.scale must be at least 2, got {self.scale}")
        if self.codes_per_step < 1 or self.side**2 != self.codes_per_step:
            raise ConfigError(f"upscale.codes_per_step must be a square such as 1, 4 or 16, got {self.codes_per_step}")

    @property
    def side(self) -> int:
        """Codes on each side of a block."""
        return math.isqrt(self.codes_per_step)

    def high(self, low: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the grid that is drawn for one that is refined."""
        return low[0] * self.scale, low[1] * self.scale

    def text(self, grids: Iterable[tuple[int, int]], *, factor: int) -> str:
        """Sizes in pixels, and K."""
        pairs = ((grid, self.high(grid)) for grid in grids)
        sizes = (" to ".join(f"{columns * factor}x{rows * factor}" for rows, columns in pair) for pair in pairs)
        return f"{', '.join(sizes)}; {self.codes_per_step} codes a step"
