from collections.abc import Callable
from typing import Any

import pytest
import torch

from mars.errors import CheckpointError, ConfigError
from mars.model.lora import TARGETS, Adapter, LoraConfig, adapter_of, add_lora, lora_tensors, merged
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.training.losses import text_to_image_loss
from tests.model.conftest import CODES, ROWS, codes_logits, train_adapter

BUILDS: dict[str, dict[str, Any]] = {"paper": {}, "one output": {"duplicate_output": False}}


@pytest.fixture(params=["paper", "pocket", "one output"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**BUILDS.get(request.param, pocket))


def adapted(transformer: MarsTransformer, **config: Any) -> MarsTransformer:
    add_lora(transformer, LoraConfig(**config), generator=torch.Generator().manual_seed(0))
    return transformer


def test_a_new_adapter_changes_nothing_at_all(transformer: MarsTransformer) -> None:
    before = codes_logits(transformer)
    assert torch.equal(codes_logits(adapted(transformer)), before)


def test_every_linear_layer_of_the_visual_expert_and_no_other_has_an_adapter(transformer: MarsTransformer) -> None:
    wanted = {name for name in transformer.visual_tensors() if ".visual." in name and name.endswith("_proj.weight")}
    found = adapter_of(lora_tensors(adapted(transformer)), LoraConfig()).pairs
    assert {f"{name}.weight" for name in found} == wanted


def test_parameters_of_the_model_keep_their_names(transformer: MarsTransformer) -> None:
    before = dict(transformer.named_parameters())
    after = dict(adapted(transformer).named_parameters())
    assert {name for name in after if name not in before} == lora_tensors(transformer).keys()
    assert all(after[name] is weight for name, weight in before.items())


def test_training_moves_adapters_only(transformer: MarsTransformer) -> None:
    adapted(transformer, rank=2)
    train_adapter(transformer)
    text_to_image_loss(transformer, CODES, read_prefixes(transformer, ROWS)).backward()
    moved = {name for name, weight in transformer.named_parameters() if weight.grad is not None}
    assert moved == lora_tensors(transformer).keys()
    assert all(bool(weight.grad.any()) for weight in lora_tensors(transformer).values() if weight.grad is not None)


def test_a_merged_adapter_gives_what_the_adapter_gives(
    transformer: MarsTransformer, build_tiny: Callable[..., MarsTransformer]
) -> None:
    before = codes_logits(transformer)
    plain = build_tiny(**vars(transformer.config.semvie))
    train_adapter(adapted(transformer, rank=3, alpha=5.0))
    wanted = codes_logits(transformer)
    assert not torch.allclose(wanted, before, atol=1e-2)
    visual = plain.visual_tensors()
    for name, weight in merged(visual, adapter_of(lora_tensors(transformer), LoraConfig(rank=3, alpha=5.0))):
        visual[name].data.copy_(weight)
    assert torch.allclose(codes_logits(plain), wanted, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_scale_is_how_much_of_the_difference_is_added(scale: float) -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    adapter = Adapter(name="x", pairs={"layers.0.visual.q_proj": (a, b)}, scale=4.0, base_digest=None)
    visual = {"layers.0.visual.q_proj.weight": weight}
    ((_, after),) = merged(visual, adapter, scale=scale)
    assert torch.allclose(after, weight + scale * 4 * b @ a, atol=1e-6)


def test_halves_are_merged_in_fp32_and_stay_halves() -> None:
    weight = torch.full((1, 1), 1.0, dtype=torch.float16)
    small = torch.full((1, 1), 2.0**-7, dtype=torch.float16)  # whose square would vanish beside 1 in 16 bits
    pairs = {"layers.0.visual.q_proj": (small, small)}
    adapter = Adapter(name="x", pairs=pairs, scale=32.0, base_digest=None)
    ((_, after),) = merged({"layers.0.visual.q_proj.weight": weight}, adapter)
    assert after.dtype is torch.float16
    assert float(after) == pytest.approx(1 + 32 * 2**-14, abs=2**-11)


def test_dropout_acts_in_training_only(transformer: MarsTransformer) -> None:
    train_adapter(adapted(transformer, dropout=0.5))
    assert torch.equal(codes_logits(transformer), codes_logits(transformer))
    transformer.train()
    assert not torch.equal(codes_logits(transformer), codes_logits(transformer))


def test_an_adapter_of_another_model_is_one_line() -> None:
    pair = (torch.zeros(2, 5), torch.zeros(6, 2))
    adapter = Adapter(name="a", pairs={"layers.0.visual.q_proj": pair}, scale=1.0, base_digest=None)
    with pytest.raises(CheckpointError, match=r"a adapts layers\.0\.visual\.q_proj, which .* does not have"):
        merged({}, adapter)
    with pytest.raises(CheckpointError, match=r"a needs layers\.0\.visual\.q_proj of 6x5, but this model's is 6x4"):
        merged({"layers.0.visual.q_proj.weight": torch.zeros(6, 4)}, adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be greater than 0 and finite, got 0.0"),
        ({"alpha": float("inf")}, "alpha must be greater than 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"targets": ("q_proj", "head")}, r"targets must be some of q_proj, .*, got \['q_proj', 'head'\]"),
        ({"targets": ()}, r"targets must be some of q_proj, .*, got \[\]"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.{message}"):
        LoraConfig(**change)


def test_targets_that_the_model_lacks_are_one_line(build_tiny: Callable[..., MarsTransformer]) -> None:
    with pytest.raises(ConfigError, match=r"must be layers of the visual expert, got \['o_proj'\]"):
        adapted(build_tiny(duplicate_output=False), targets=("o_proj",))
    assert "o_proj" in TARGETS
