"""What a curated set must hold, as data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mars.errors import ConfigError

MAX_DISTANCE = 11
"""Farther apart than that, pictures have little in common, and the search looks at most of them."""


@dataclass(frozen=True, kw_only=True)
class SizeRules:
    """Of the picture as it is stored, in pixels."""

    least_side: int = 64
    most_pixels: int = 64_000_000
    most_aspect: float = 3.0
    """The longer side over the shorter."""

    def __post_init__(self) -> None:
        if self.least_side < 1 or self.most_pixels < 1:
            raise ConfigError("size.least_side and size.most_pixels must be at least 1")
        if self.most_aspect < 1:
            raise ConfigError(
                f"size.most_aspect is the longer side over the shorter, at least 1, got {self.most_aspect}"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """Of each caption; a picture goes when too few of its captions stay."""

    languages: tuple[str, ...] = ("en", "zh")
    """Captions in others are dropped."""
    mislabelled: Literal["drop", "correct"] = "drop"
    """What becomes of a caption whose language is not the one it is labelled with."""
    length: dict[str, tuple[int, int]] = field(default_factory=lambda: {"en": (1, 256), "zh": (1, 384)})
    """Fewest and most words, or Chinese and Japanese characters, per language; others are not measured."""
    required: int = 1
    """Captions that a picture must have left."""

    def __post_init__(self) -> None:
        if not self.languages:
            raise ConfigError("captions.languages must name at least one language, got none")
        for language, (fewest, most) in self.length.items():
            if not 0 <= fewest <= most:
                raise ConfigError(f"captions.length.{language} must be [fewest, most], got [{fewest}, {most}]")
        if self.required < 0:
            raise ConfigError(f"captions.required must be at least 0, got {self.required}")


@dataclass(frozen=True, kw_only=True)
class DuplicateRules:
    """When two pictures count as the same, and which of them stays."""

    distance: int | None = 4
    """Most bits of 64 in which their perceptual hashes differ; null does not look for duplicates."""
    colour: int = 16
    """Most that the mean colours of any of 4x4 cells differ, of 255."""
    keep: Literal["best", "first"] = "best"
    """`best`: with the most pixels, then the longest caption, then the first."""

    def __post_init__(self) -> None:
        if self.distance is not None and not 0 <= self.distance <= MAX_DISTANCE:
            raise ConfigError(f"duplicates.distance must lie in 0..{MAX_DISTANCE} bits of 64, got {self.distance}")
        if not 0 <= self.colour <= 255:
            raise ConfigError(f"duplicates.colour must lie in 0..255, got {self.colour}")


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """A class that scores pictures, and the scores that stay."""

    scorer: str
    """`module:Class`."""
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    """Arguments of the class."""
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        module, colon, name = self.scorer.partition(":")
        if not (module and colon and name):
            raise ConfigError(f"a scorer must be named module:Class, got {self.scorer!r}")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ConfigError(f"{self.scorer} cannot have least {self.least} above most {self.most}")


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Everything that decides which pictures stay."""

    size: SizeRules = field(default_factory=SizeRules)
    captions: CaptionRules = field(default_factory=CaptionRules)
    duplicates: DuplicateRules = field(default_factory=DuplicateRules)
    scorers: tuple[ScorerConfig, ...] = ()
    remove: tuple[Path, ...] = ()
    """Lists of what must go, one entry a line: a key, a URL, the SHA-256 of a file, or a perceptual hash."""
