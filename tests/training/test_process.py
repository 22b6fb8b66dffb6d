from pathlib import Path

import pytest
import torch

from mars.errors import CheckpointError, ConfigError
from mars.training.process import Process, choose_device, has_fast_bf16

CPU = torch.device("cpu")


def test_a_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ConfigError, match="device must be 'cpu' or 'auto' here, got 'cuda'"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "fast"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_bf16_is_fast_on_a_cpu_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512_bf16: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert has_fast_bf16(torch.device("cpu")) is fast


def test_one_process_is_all_there_are() -> None:
    process = Process(CPU)
    assert process.is_main
    assert process.sum({"a": 2.0}) == {"a": 2.0}
    assert process.any(True)
    assert not process.any(False)
    assert process.decide(lambda: 3) == 3


def test_gradients_are_clipped_to_a_norm() -> None:
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    assert Process(CPU).clip(weights, limit=1.0) == pytest.approx(28**0.5)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    assert sum(float(gradient.square().sum()) for gradient in gradients) == pytest.approx(1.0, rel=1e-5)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    process, weight = Process(CPU), torch.randn(3, 2)
    tensors = {
        "0/layer.weight/momentum": weight,
        "0/layer.weight/step": torch.tensor(7.0),
        "weights/layer.weight": weight + 1,
    }
    process.write_state(tmp_path, tensors)
    found = process.read_state(tmp_path, weights={"layer.weight": weight})
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_weights_that_do_not_fit_are_not_loaded() -> None:
    weights = {"a": torch.zeros(2)}
    Process(CPU).load({"a": torch.ones(2)}, into=weights, where="here")
    assert weights["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"here does not fit its configuration: a must be \[2\], got \[3\]"):
        Process(CPU).load({"a": torch.ones(3)}, into=weights, where="here")
