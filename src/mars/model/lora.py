"""LoRA (Hu et al. 2021, arXiv 2106.09685): small trained matrices beside the frozen ones of the visual expert.

    y = W x + (alpha / rank) B A x          A starts at random, B at zero: an untrained adapter changes nothing

Modules are named as in `peft`, so that its files are ours (`mars.adapter` reads and writes them).

Letters: O outputs, I inputs, K rank.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mars.errors import CheckpointError, ConfigError
from mars.model.layers import Linear
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of an expert."""
A, B = ".lora_A.weight", ".lora_B.weight"
"""Of a layer's adapter, behind the layer's name."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers of the visual expert get an adapter, and how large it is."""

    rank: int = 8
    alpha: float = 16.0
    """What B A x is multiplied by, times the rank: another rank then needs no other learning rate."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha must be greater than 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ConfigError(f"lora.targets must be some of {', '.join(TARGETS)}, got {list(self.targets)}")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter, apart from the model that it belongs to."""

    name: str
    """Where it comes from, for messages."""
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """A (K, I) and B (O, K) of each linear layer, by the layer's name in the transformer."""
    scale: float
    """What B A is multiplied by."""
    base_digest: str | None
    """`visual_digest` of the weights that it was trained on; files of others do not say it."""

    def tensors(self) -> dict[str, Tensor]:
        """Its matrices by name, as `lora_tensors` names them."""
        return {layer + end: half for layer, pair in self.pairs.items() for end, half in zip((A, B), pair, strict=True)}


class LoraLinear(Linear):
    """A frozen linear layer, its own parameters kept, and an adapter."""

    def __init__(self, base: Linear, config: LoraConfig, *, generator: torch.Generator) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank
        with torch.device("meta"):
            self.lora_A = Linear(base.in_features, config.rank, bias=False)
            self.lora_B = Linear(config.rank, base.out_features, bias=False)
        device, bound = base.weight.device, base.in_features**-0.5  # Kaiming's, as in the authors' code
        start_KI = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight = nn.Parameter(start_KI.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        low: Tensor = self.lora_B(self.lora_A(self.dropout(x)))
        return super().forward(x) + self.scale * low


def add_lora(transformer: MarsTransformer, config: LoraConfig, *, generator: torch.Generator) -> None:
    """Freezes the whole model and gives its visual expert adapters, which alone can then be trained.

    Raises:
        ConfigError: if the visual expert has none of the targets.
    """
    transformer.requires_grad_(False)
    found = 0
    for layer in transformer.layers:
        assert isinstance(layer, SemVIELayer)
        for name in config.targets:
            linear = getattr(layer.visual, name, None)  # no o_proj where it is the LLM's
            if layer.visual is not None and linear is not None:
                setattr(layer.visual, name, LoraLinear(linear, config, generator=generator))
                found += 1
    if not found:
        raise ConfigError(f"lora.targets must be layers of the visual expert, got {list(config.targets)}")


def lora_tensors(transformer: MarsTransformer) -> dict[str, nn.Parameter]:
    """The adapters' matrices by name, such as `layers.4.visual.q_proj.lora_A.weight`."""
    return {name: weight for name, weight in transformer.named_parameters() if ".lora_" in name}


def merged(weights: Mapping[str, Tensor], adapter: Adapter, *, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """The weights that an adapter changes, with their names, one made after the other: W + scale * (alpha / rank) B A,
    computed in fp32 and kept in W's dtype.

    Args:
        weights: the visual tensors of a model, by name; they are not changed.
        scale: how strongly the adapter counts; 0 is not at all.

    Raises:
        CheckpointError: if the adapter is for a model of another shape.
    """
    for name, (a_KI, b_OK) in adapter.pairs.items():
        weight_OI = weights.get(f"{name}.weight")
        if weight_OI is None:
            raise CheckpointError(
                f"{adapter.name} adapts {name}, which the visual expert of this model does not have; "
                "use the model that it was trained on"
            )
        if weight_OI.shape != (len(b_OK), a_KI.shape[1]):
            raise CheckpointError(
                f"{adapter.name} needs {name} of {len(b_OK)}x{a_KI.shape[1]}, but this model's is "
                f"{'x'.join(map(str, weight_OI.shape))}; use the model that it was trained on"
            )
    return ((f"{name}.weight", _merge(weights[f"{name}.weight"], adapter, name, scale)) for name in adapter.pairs)


@torch.no_grad()
def _merge(weight_OI: Tensor, adapter: Adapter, name: str, scale: float) -> Tensor:
    a_KI, b_OK = adapter.pairs[name]
    difference_OI = b_OK.float() @ a_KI.float() * (adapter.scale * scale)
    return (weight_OI.float() + difference_OI.to(weight_OI.device)).to(weight_OI.dtype)


def adapter_of(
    weights: Mapping[str, Tensor], config: LoraConfig, *, name: str = "the adapter", base_digest: str | None = None
) -> Adapter:
    """The adapter that consists of what `lora_tensors` names."""
    layers = sorted(key.removesuffix(A) for key in weights if key.endswith(A))
    return Adapter(
        name=name,
        pairs={layer: (weights[layer + A].detach(), weights[layer + B].detach()) for layer in layers},
        scale=config.alpha / config.rank,
        base_digest=base_digest,
    )
