import json
from pathlib import Path

import pytest
from PIL import Image

from mars.errors import RequestError
from mars.evaluation.speed import bytes_per_step, speed_benchmark
from mars.generation.sampling import Sampling
from mars.model.kernel import find_kernel
from mars.pipeline import MarsPipeline


def test_a_model_is_measured_and_plotted(tiny_model: Path, tmp_path: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_model)
    told: list[str] = []
    found = speed_benchmark(
        pipe, out=tmp_path / "new", batches=[1, 3], repeats=2, sampling=Sampling(guidance=2.0), say=told.append
    )
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == found
    with Image.open(tmp_path / "new" / "speed.png") as image:
        assert image.width > 600
    for batch, count in zip(found["batches"], (1, 3), strict=True):
        assert batch["pictures"] == count
        assert batch["codes/s"] == pytest.approx(6 * count / batch["seconds"])
    steps = found["steps"]
    assert steps["least seconds"] == pytest.approx(steps["bytes"] / steps["bandwidth GB/s"] / 1e9)
    assert 0 < found["first preview"] < found["batches"][0]["seconds"] * 20
    assert 20 < found["resident megabytes"] < 20_000
    assert len(told) == 3


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("fp16", 16)])
def test_a_step_reads_each_weight_of_the_visual_expert_once(tiny_model: Path, precision: str, bits: int) -> None:
    if precision == "fp16" and find_kernel() is None:
        pytest.skip("no copies in fp16 without a kernel")
    transformer = MarsPipeline.from_pretrained(tiny_model, precision=precision).model.transformer  # type: ignore[arg-type]
    matrices = {
        name: weight
        for name, weight in transformer.visual_tensors().items()
        if weight.dim() == 2 and (".visual." in name or name.startswith("visual_head"))
    }
    assert bytes_per_step(transformer) * 8 == bits * sum(weight.numel() for weight in matrices.values())


def test_numbers_that_cannot_be_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_model)
    for batches, repeats in (([], 1), ([0], 1), ([1], 0)):
        with pytest.raises(RequestError, match="batches and repeats must be at least 1"):
            speed_benchmark(
                pipe, out=tmp_path / "x", batches=batches, repeats=repeats, sampling=Sampling(), say=lambda _: None
            )
    assert not (tmp_path / "x").exists()
