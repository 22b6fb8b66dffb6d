import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import train_step
from benchmarks.train_baselines import Joint, Routed, Select, Shared, share_weights, whole_rows_loss
from benchmarks.train_step import Batch, Case, Step, adamw, compare_losses, count_operations, measure_times
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer

BATCH = Batch(codes_BRC=torch.arange(12).view(2, 2, 3), captions=[[1, 40, 41, 42], [1, 50]])
TINY = Case(grid=2, captions="short", batch=3)


@pytest.fixture
def transformer(build_tiny: Callable[..., MarsTransformer]) -> MarsTransformer:
    return build_tiny()


def gradients(transformer: MarsTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}
    return {name: gradient for name, gradient in found.items() if bool(gradient.any())}


def step(variant: str, task: str, transformer: MarsTransformer) -> Step:
    return Step(
        variant=variant,
        task=task,
        transformer=transformer,
        batch=BATCH,
        optimizer=adamw(transformer),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("mix", [Select, Routed])
@pytest.mark.parametrize("task", train_step.TASKS)
def test_a_baseline_has_our_loss_and_our_gradients(transformer: MarsTransformer, task: str, mix: type) -> None:
    ours = BATCH.our_loss(task, transformer)
    theirs = whole_rows_loss(transformer, BATCH.segments(task, transformer), mix=mix)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    wanted, found = gradients(transformer, ours), gradients(transformer, theirs)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-6), name


def test_a_dense_model_starts_as_one_with_copied_experts(transformer: MarsTransformer) -> None:
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    before = [float(BATCH.our_loss(task, transformer).detach()) for task in train_step.TASKS]
    size = sum(weight.numel() for weight in transformer.parameters())
    share_weights(transformer)
    for task, loss in zip(train_step.TASKS, before, strict=True):
        dense = whole_rows_loss(transformer, BATCH.segments(task, transformer), mix=Shared)
        assert float(dense.detach()) == pytest.approx(loss, rel=1e-6)
        assert any(name.startswith("layers.0.language") for name in gradients(transformer, dense))
    assert sum(weight.numel() for weight in transformer.parameters()) < size


def test_one_vocabulary_is_a_softmax_over_text_ids_and_codes(transformer: MarsTransformer) -> None:
    share_weights(transformer)
    for task in train_step.TASKS:
        segments = BATCH.segments(task, transformer)
        cache = transformer.new_cache()
        hidden = [transformer(segment, cache) for segment in segments][-1]
        logits = torch.cat([transformer.text_logits(hidden), transformer.visual_logits(hidden)], dim=2)
        assert segments[-1].targets is not None
        wanted = F.cross_entropy(logits.flatten(0, 1), segments[-1].targets.flatten())
        found = whole_rows_loss(transformer, segments, mix=Joint)
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_losses_that_differ_stop_the_benchmark(transformer: MarsTransformer) -> None:
    steps = [step(variant, "captioning", transformer) for variant in ("ours", "select", "routed")]
    assert len(set(map(round, compare_losses(steps).values()))) == 1
    steps[1].batch = Batch(codes_BRC=BATCH.codes_BRC.flip(0), captions=BATCH.captions)
    with pytest.raises(ValueError, match="one loss"):
        compare_losses(steps)


def test_every_variant_is_timed_and_counted(transformer: MarsTransformer) -> None:
    steps = [step(variant, "text to image", transformer) for variant in ("ours", "held", "select", "routed")]
    counted = [count_operations(one) for one in steps]
    held, ours, routed, select = counted[1], counted[0], counted[3], counted[2]
    assert 0 < held < ours < routed < select
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    seconds = measure_times(steps, repeats=2)
    assert {name: len(turns) for name, turns in seconds.items()} == dict.fromkeys(seconds, 2)
    moved = {name for name, weight in transformer.named_parameters() if not torch.equal(weight, before[name])}
    assert moved <= transformer.visual_tensors().keys()
    assert "layers.1.visual.up_proj.weight" in moved


@pytest.mark.slow
def test_the_command_writes_tables_and_figures(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "CASES", (TINY,))
    out = tmp_path / "figures.json"
    train_step.main(["--language", str(tiny_llm), "--cases", TINY.name, "--repeats", "1", "--out", str(out)])
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [result["task"] for result in results] == list(train_step.TASKS)
    assert [len(result["variants"]) for result in results] == [6, 5]
    for result in results:
        for found in result["variants"].values():
            assert found["bytes of weights"] > 100_000
            assert found["bytes beside weights"] > 100_000
    assert "| routed |" in capsys.readouterr().out
