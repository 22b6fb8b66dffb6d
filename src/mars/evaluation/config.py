"""What `mars eval` measures, as a TOML file says it."""

from dataclasses import dataclass
from pathlib import Path

from mars.errors import ConfigError
from mars.evaluation.questions import SETS
from mars.generation.sampling import Sampling
from mars.pipeline.orders import DEFAULT_SAMPLING


@dataclass(frozen=True, kw_only=True)
class EmojiBench:
    """Retrieval of true pictures, captions, the image tokenizer's fidelity, diversity and memorisation."""

    pictures: Path = Path("data/noto.tar")
    """A picture shard with captions in both languages."""
    prompts: int = 200
    """Per language in "trained names"; other sets have a share of it."""
    sets: tuple[str, ...] = tuple(SETS)
    """Names of `questions.SETS`."""
    diverse_prompts: int = 0
    """How many trained names are drawn again with other seeds, to see how much pictures of one prompt differ."""
    seeds: int = 4
    """Pictures of each of those."""
    captions: int = 0
    """How many true pictures are described, of the trained and of the held-out ones each."""
    memorisation: bool = False
    """Whether drawn pictures are compared with every training picture of the shard."""
    distribution: str | None = None
    """The network of FID and KID, as `distribution.open_network` takes it; without one they are left out."""
    clip: Path | None = None
    """A folder with a CLIP, for CLIPScore and R-precision of the English prompts."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sets if name not in SETS]:
            raise ConfigError(f"emoji.sets must be some of {', '.join(SETS)}, got {', '.join(unknown)}")
        if not self.sets or self.prompts < 1:
            raise ConfigError(f"emoji must have sets and at least 1 prompt, got {len(self.sets)} and {self.prompts}")
        if self.captions < 0:
            raise ConfigError(f"emoji.captions must be at least 0, got {self.captions}")
        if self.diverse_prompts < 0 or self.diverse_prompts == 1 or self.seeds < 2:
            raise ConfigError(
                "emoji.diverse_prompts must be 0 or at least 2 and emoji.seeds at least 2, "
                f"got {self.diverse_prompts} and {self.seeds}"
            )


@dataclass(frozen=True, kw_only=True)
class CompositionBench:
    """The exact compositional bench on scenes."""

    prompts: int = 48
    """Of each category in each language, if there are as many; of counts there are 48."""
    captions: int = 0
    """How many of the scenes of each category are described."""

    def __post_init__(self) -> None:
        if self.prompts < 1 or not 0 <= self.captions <= self.prompts:
            raise ConfigError(
                "composition.prompts must be at least 1 and composition.captions 0 to as many, "
                f"got {self.prompts} and {self.captions}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One evaluation; a table that is left out is not measured."""

    model: str | None = None
    """A folder, or `owner/name[@revision]` on the hub; without one, the model that comes with the package."""
    precision: str = "fp16"
    """Of the weights in memory: fp32, fp16, int8 or int4."""
    out: Path = Path("out/eval")
    """The folder of the report."""
    seed: int = 0
    """Of the choice of prompts and of the pictures."""
    sampling: Sampling = DEFAULT_SAMPLING
    """As a table it is whole: what it leaves out is not the pipeline's default, but none (`Sampling`)."""
    scorer: str = "likelihood"
    """Who chooses among candidates, as `mars generate --scorer` takes it."""
    emoji: EmojiBench | None = None
    composition: CompositionBench | None = None

    def __post_init__(self) -> None:
        if self.emoji is None and self.composition is None:
            raise ConfigError("an evaluation must have a table [emoji] or [composition], got neither")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.scorer != "likelihood" and self.sampling.candidates == 1:
            raise ConfigError(
                f"the scorer {self.scorer} chooses among candidates; sampling.candidates must be 2 or more, got 1"
            )
