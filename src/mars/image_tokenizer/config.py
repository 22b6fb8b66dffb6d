"""The shape of an image tokenizer."""

from dataclasses import dataclass

from mars.errors import ConfigError

NORMS = ("group", "place")
CODE_CHOICES = ("l2", "cosine", "dot", "lfq")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """A VQ-GAN of the taming family; the defaults are openMUSE's f16 / 8,192 tokenizer (146.2 M parameters)."""

    num_codes: int = 8192
    code_width: int = 64
    channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    """Channels of each level; every level but the last halves the picture."""
    blocks_per_level: int | tuple[int, ...] = 2
    """Residual blocks of each level of the encoder; one number is for all levels."""
    patch: int = 1
    """Pixels on each side that the stem folds into channels (pixel unshuffle)."""
    attention_levels: tuple[int, ...] = ()
    """Levels with self-attention after each block; 0 is the finest."""
    middle_attention: bool = False
    norm: str = "group"
    """`group` norms know of the whole picture, `place` norms of one place only: equal patches then get equal codes."""
    norm_groups: int = 32
    """Groups of the `group` norms; all widths are multiples of it."""
    code_choice: str = "l2"
    """How a vector's code is chosen: `l2` nearest, `cosine` nearest in angle, `dot` largest product, `lfq` signs."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """What black and white are inside the network."""
    latent_channels: int | None = None
    """Channels where encoder and decoder meet the 1x1 convolutions around the codebook; null is `code_width`."""
    decoder_channels: tuple[int, ...] | None = None
    """Channels of each level of the decoder, the finest first; null is the encoder's."""
    decoder_blocks: int | tuple[int, ...] | None = None
    """Residual blocks of each level of the decoder; null is one more than the encoder's, as in taming."""

    def __post_init__(self) -> None:
        for name in ("num_codes", "code_width", "patch", "norm_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"image_tokenizer.{name} must be at least 1, got {getattr(self, name)}")
        if self.latent_channels is not None and self.latent_channels < 1:
            raise ConfigError(f"image_tokenizer.latent_channels must be at least 1, got {self.latent_channels}")
        for name, widths in (("channels", self.channels), ("decoder_channels", self.up_channels)):
            if not widths or any(width < 1 or width % self.norm_groups for width in widths):
                raise ConfigError(
                    f"image_tokenizer.{name} must be multiples of norm_groups {self.norm_groups}, got {list(widths)}"
                )
        self._check_levels()
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ConfigError(
                    f"image_tokenizer.attention_levels must lie in 0..{len(self.channels) - 1}, got {level}"
                )
        if self.norm not in NORMS:
            raise ConfigError(f"image_tokenizer.norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.code_choice not in CODE_CHOICES:
            raise ConfigError(
                f"image_tokenizer.code_choice must be one of {', '.join(CODE_CHOICES)}, got {self.code_choice!r}"
            )
        if self.code_choice == "lfq" and self.num_codes != 2**self.code_width:
            raise ConfigError(
                f"image_tokenizer.num_codes must be 2 ** code_width for lfq, got {self.num_codes} and {self.code_width}"
            )
        if not self.pixel_range[0] < self.pixel_range[1]:
            raise ConfigError(f"image_tokenizer.pixel_range must rise, got {list(self.pixel_range)}")

    def _check_levels(self) -> None:
        levels = len(self.channels)
        if len(self.up_channels) != levels:
            raise ConfigError(
                f"image_tokenizer.decoder_channels must have {levels} values as channels has, "
                f"got {len(self.up_channels)}"
            )
        for name in ("blocks_per_level", "decoder_blocks"):
            value = getattr(self, name)
            blocks = value if isinstance(value, tuple) else (1 if value is None else value,) * levels
            if len(blocks) != levels or min(blocks) < 1:
                raise ConfigError(
                    f"image_tokenizer.{name} must be at least 1, one number or {levels} (as channels has), "
                    f"got {list(value) if isinstance(value, tuple) else value}"
                )

    @property
    def down_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level of the encoder, the finest first."""
        blocks = self.blocks_per_level
        return blocks if isinstance(blocks, tuple) else (blocks,) * len(self.channels)

    @property
    def up_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level of the decoder, the finest first."""
        blocks = self.decoder_blocks
        if blocks is None:
            return tuple(one + 1 for one in self.down_blocks)
        return blocks if isinstance(blocks, tuple) else (blocks,) * len(self.channels)

    @property
    def up_channels(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, the finest first."""
        return self.channels if self.decoder_channels is None else self.decoder_channels

    @property
    def latent(self) -> int:
        """Channels of the encoder's output and of the decoder's input."""
        return self.latent_channels or self.code_width

    @property
    def factor(self) -> int:
        """Pixels on each side of a code (16 for f16)."""
        return int(self.patch * 2 ** (len(self.channels) - 1))
