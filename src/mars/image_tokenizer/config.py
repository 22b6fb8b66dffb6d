"""The shape of an image tokenizer."""

from dataclasses import dataclass

from mars.errors import ConfigError

CODE_CHOICES = ("l2", "cosine", "dot", "lfq")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """A VQ-GAN of the taming family; the defaults are openMUSE's f16 / 8,192 tokenizer (146.2 M parameters)."""

    num_codes: int = 8192
    code_width: int = 64
    channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    """Channels of each level; every level but the last halves the picture."""
    blocks_per_level: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    patch: int = 1
    """Pixels on each side that the stem folds into channels (pixel unshuffle)."""
    attention_levels: tuple[int, ...] = ()
    """Levels with self-attention after each block; 0 is the finest."""
    middle_attention: bool = False
    norm_groups: int = 32
    code_choice: str = "l2"
    """How a vector's code is chosen: `l2` nearest, `cosine` nearest in angle, `dot` largest product, `lfq` signs."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """What black and white are inside the network."""

    def __post_init__(self) -> None:
        for name in ("num_codes", "code_width", "blocks_per_level", "patch", "norm_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"image_tokenizer.{name} must be at least 1, got {getattr(self, name)}")
        if not self.channels or any(width < 1 or width % self.norm_groups for width in self.channels):
            raise ConfigError(
                f"image_tokenizer.channels must be multiples of norm_groups {self.norm_groups}, "
                f"got {list(self.channels)}"
            )
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ConfigError(
                    f"image_tokenizer.attention_levels must lie in 0..{len(self.channels) - 1}, got {level}"
                )
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

    @property
    def factor(self) -> int:
        """Pixels on each side of a code (16 for f16)."""
        return int(self.patch * 2 ** (len(self.channels) - 1))
