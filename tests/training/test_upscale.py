from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.checkpoint import load_image_tokenizer, read_info, read_tensors, save_model
from mars.config import from_dict
from mars.data.shards import read_codes, write_codes
from mars.errors import ConfigError, DataError
from mars.generation.sampling import Sampling
from mars.model.config import UpscaleConfig
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.pipeline import MarsPipeline
from mars.sequence.layout import low_image, text_segment, upscaled_image
from mars.training.setup import open_stage
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer
from mars.training.upscale import upscale_loss

ROWS = [[1, 40, 41, 42], [1]]
LOW = torch.arange(16).view(2, 2, 4)
HIGH = torch.arange(64).view(2, 4, 8)

every_side = pytest.mark.parametrize("side", [1, 2, 4])


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    options = {**pocket, "max_grid": 8} if request.param == "pocket" else {}
    return build_tiny(**options, low_input=True)


@every_side
def test_the_loss_is_the_mean_surprise_of_each_code(transformer: MarsTransformer, side: int) -> None:
    surprises: list[Tensor] = []
    for row, low, high in zip(ROWS, LOW, HIGH, strict=True):
        cache = transformer.new_cache()
        transformer(text_segment([row]), cache)
        transformer(low_image(low[None], transformer.vocabulary), cache)
        drawn = upscaled_image(low[None], high[None], transformer.vocabulary, side=side)
        shares = transformer.visual_logits(transformer(drawn, cache))[0].detach().softmax(1)
        rows, columns = drawn.places()
        surprises += [-one[high[row, column]].log() for one, row, column in zip(shares, rows, columns, strict=True)]
    assert len(surprises) == 64
    loss = upscale_loss(transformer, LOW, HIGH, read_prefixes(transformer, ROWS), side=side)
    torch.testing.assert_close(loss.detach(), torch.stack(surprises).mean())


@every_side
def test_the_visual_side_learns_and_nothing_else(transformer: MarsTransformer, side: int) -> None:
    transformer.zero_grad()
    upscale_loss(transformer, LOW, HIGH, read_prefixes(transformer, ROWS), side=side).backward()
    moved = {name for name, one in transformer.named_parameters() if one.grad is not None and bool(one.grad.any())}
    assert moved <= transformer.visual_tensors().keys()
    assert {"low_projection.weight", "visual_embedding.weight", "visual_head.weight"} <= moved
    assert {name for name in transformer.visual_tensors() if ".visual." in name} <= moved


def test_a_few_steps_learn_to_refine(build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]) -> None:
    """High codes are a function of the low code and the place inside it, which a start at zero must find."""
    transformer = build_tiny(**{**pocket, "max_grid": 8}, low_input=True)
    transformer.low_projection.weight.data.zero_()
    prefixes = read_prefixes(transformer, [[1]] * 16)
    low = torch.randint(8, (16, 2, 2))
    high = low.repeat_interleave(2, 1).repeat_interleave(2, 2) * 4 + torch.tensor([[0, 1], [2, 3]]).repeat(2, 2)
    trained = list(transformer.visual_tensors().values())
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = upscale_loss(transformer, low, high, prefixes, side=2)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 < 4 < losses[0]


def test_grids_that_do_not_fit_are_one_line(transformer: MarsTransformer) -> None:
    prefixes = read_prefixes(transformer, ROWS)
    with pytest.raises(ConfigError, match="must fill the grid, got 2x4"):
        upscale_loss(transformer, LOW, LOW, prefixes, side=4)
    with pytest.raises(ConfigError, match="a whole number of times the low one, got 2x4 for 4x8"):
        upscale_loss(transformer, HIGH, LOW, prefixes, side=1)


@pytest.fixture(scope="session")
def tiny_pairs(tiny_codes: Path) -> list[Path]:
    """The code shard of the tiny pictures, and one of grids twice as large, whose codes are those + 0..3."""
    found, digest = read_codes(tiny_codes)
    inside = torch.tensor([[0, 1], [2, 3]]).repeat(2, 3).numpy()
    larger = tiny_codes.with_stem("larger")
    high = [replace(one, codes=(one.codes.repeat(2, axis=0).repeat(2, axis=1) + inside) % 64) for one in found]
    write_codes(larger, high, tokenizer=digest)
    return [tiny_codes, larger]


@pytest.fixture(scope="session")
def beginner(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    build_tiny: Callable[..., MarsTransformer],
    pocket: dict[str, Any],
) -> Path:
    """A model that draws, and whose grid embedding has room for twice as many rows and columns."""
    folder = tmp_path_factory.mktemp("beginner")
    image_tokenizer, _ = load_image_tokenizer(tiny_model)
    transformer = build_tiny(**{**pocket, "max_grid": 8})
    save_model(folder, info=read_info(tiny_model)[0], transformer=transformer, image_tokenizer=image_tokenizer)
    return folder


@pytest.fixture
def upscaling(stage: Callable[..., dict[str, Any]], beginner: Path, tiny_pairs: list[Path]) -> dict[str, Any]:
    """The table of a stage that trains the beginner to upscale."""
    return stage(
        stage="upscale", name="larger", tasks={}, model={"start_from": str(beginner)},
        data={"shards": list(map(str, tiny_pairs))},
    )  # fmt: skip


def test_the_stage_continues_a_model_that_then_upscales_its_grid(upscaling: dict[str, Any], beginner: Path) -> None:
    config = from_dict(StageConfig, upscaling | {"steps": 60, "optimizer": {"learning_rate": 1e-2, "warmup": 2}})
    trainer = Trainer(config)
    before = read_tensors(beginner / "visual.safetensors")
    started = trainer.transformer.visual_tensors()
    assert started.keys() - before.keys() == {"low_projection.weight"}
    assert not bool(started["low_projection.weight"].any())
    assert all(torch.equal(started[name], value.float()) for name, value in before.items())
    losses: list[dict[str, float]] = []
    trainer.train(report=lambda _, values: losses.append(dict(values)))
    assert losses[-1]["upscale/loss"] < 0.6 * losses[0]["upscale/loss"]
    info, shapes = read_info(config.out / "model")
    assert (info.grids, info.upscale, shapes.semvie.low_input) == (((2, 3),), UpscaleConfig(), True)
    pipe = MarsPipeline.from_pretrained(config.out / "model")
    small = pipe("3", seed=1, sampling=Sampling())
    assert pipe.upscale(small).codes.shape == (1, 4, 6)


def test_pictures_in_two_sizes_can_be_other_ones_than_those_that_are_drawn(
    upscaling: dict[str, Any], tiny_pairs: list[Path], tmp_path: Path
) -> None:
    few, digest = read_codes(tiny_pairs[1])
    some = tmp_path / "few.parquet"
    write_codes(some, few[:5], tokenizer=digest)
    data = {"shards": [str(tiny_pairs[0])], "pairs": [str(tiny_pairs[0]), str(some)], "held_out": ["picture"]}
    table = upscaling | {"tasks": {"text_to_image": 0.5, "upscale": 0.3, "captioning": 0.2}, "data": data}
    trainer = Trainer(from_dict(StageConfig, table))
    for step in range(40):
        task, batch = trainer.mix.draw(step)
        low = {getattr(one, "low", one.codes).shape for one in batch}
        assert low == {(2, 3)}
        assert {one.codes.shape for one in batch} == {(4, 6) if task.name == "upscale" else (2, 3)}
    assert trainer.info.grids == ((2, 3),)
    trainer.train()
    assert MarsPipeline.from_pretrained(trainer.config.out / "model").model.info.upscale == UpscaleConfig()
    with pytest.raises(ConfigError, match="data.shards must hold pictures of the smaller sizes of data.pairs"):
        open_stage(from_dict(StageConfig, table | {"data": data | {"shards": [str(tiny_pairs[1])]}}))


@pytest.mark.parametrize("block", [1, 4])
def test_a_stage_that_is_continued_is_the_whole_one_to_the_bit(
    upscaling: dict[str, Any], tmp_path: Path, block: int
) -> None:
    upscaling |= {"upscale": {"codes_per_step": block}, "tasks": {"upscale": 0.6, "text_to_image": 0.4}}
    whole = Trainer(from_dict(StageConfig, upscaling | {"out": str(tmp_path / "whole")}))
    wanted = [whole.train_step() for _ in range(6)]
    first = Trainer(from_dict(StageConfig, upscaling))
    found = [first.train_step() for _ in range(3)]
    first.save()
    resumed = Trainer(from_dict(StageConfig, upscaling))
    found += [resumed.train_step() for _ in range(3)]
    assert found == wanted
    assert {name.partition("/")[0] for one in wanted for name in one if "/" in name} == {"upscale", "text_to_image"}
    right = whole.transformer.visual_tensors()
    assert all(torch.equal(value, right[name]) for name, value in resumed.transformer.visual_tensors().items())


def test_a_run_is_not_resumed_with_another_k(upscaling: dict[str, Any]) -> None:
    Trainer(from_dict(StageConfig, upscaling)).save()
    with pytest.raises(ConfigError, match=r"upscale must stay .*: 4\}, with which .* was trained, got .*: 1\}"):
        Trainer(from_dict(StageConfig, upscaling | {"upscale": {"codes_per_step": 1}}))


def test_a_model_that_upscales_is_continued_with_another_k(upscaling: dict[str, Any], tmp_path: Path) -> None:
    first = Trainer(from_dict(StageConfig, upscaling | {"steps": 2, "upscale": {"codes_per_step": 1}}))
    first.train()
    again = {"model": {"start_from": str(first.config.out / "model")}, "out": str(tmp_path / "again")}
    second = Trainer(from_dict(StageConfig, upscaling | again))
    projection = second.transformer.low_projection.weight
    assert bool(projection.any())
    torch.testing.assert_close(projection, first.transformer.low_projection.weight, atol=1e-4, rtol=1e-2)
    drawing = {
        "stage": "pretrain",
        "tasks": {"text_to_image": 1.0},
        "data": {"shards": upscaling["data"]["shards"][:1]},
    }
    third = Trainer(from_dict(StageConfig, upscaling | again | drawing))
    assert third.info.upscale == UpscaleConfig(codes_per_step=1)


def test_pictures_of_one_size_and_blocks_that_do_not_fit_are_one_line(
    upscaling: dict[str, Any], tiny_codes: Path
) -> None:
    with pytest.raises(DataError, match="codes at two grids, one 2 times the other"):
        Trainer(from_dict(StageConfig, upscaling | {"data": {"shards": [str(tiny_codes)]}}))
    with pytest.raises(ConfigError, match="blocks of 4x4 codes must fill the grid, got 4x6"):
        Trainer(from_dict(StageConfig, upscaling | {"upscale": {"codes_per_step": 16}}))
    with pytest.raises(ConfigError, match="upscale.codes_per_step must be a square such as 1, 4 or 16, got 2"):
        from_dict(StageConfig, upscaling | {"upscale": {"codes_per_step": 2}})


def test_blocks_and_rows_that_cut_a_cell_are_refused(
    stage: Callable[..., dict[str, Any]], tiny_pairs: list[Path], tiny_llm: Path, tiny_model: Path, tmp_path: Path,
    pocket: dict[str, Any],
) -> None:  # fmt: skip
    shapes = {**pocket, "max_grid": 12, "cell": 2, "cell_width": 8}
    model = {"language": str(tiny_llm), "image_tokenizer": str(tiny_model), "semvie": shapes}
    larger = [str(tiny_pairs[1])]
    rows = stage(model=model, data={"shards": larger}, tasks={"top_rows": 1.0}, top_rows=1)
    with pytest.raises(ConfigError, match=r"top_rows must be a multiple of semvie\.cell, 2, got 1"):
        open_stage(from_dict(StageConfig, rows))
    few, digest = read_codes(tiny_pairs[1])
    thrice = [replace(one, codes=one.codes.repeat(3, axis=0).repeat(3, axis=1)) for one in few]
    write_codes(tmp_path / "thrice.parquet", thrice, tokenizer=digest)
    data = {"shards": [*larger, str(tmp_path / "thrice.parquet")]}
    table = stage(model=model, data=data, tasks={"upscale": 1.0}, upscale={"scale": 3, "codes_per_step": 9})
    with pytest.raises(ConfigError, match=r"upscale\.scale must be a multiple of semvie\.cell, 2, got 3"):
        open_stage(from_dict(StageConfig, table))
