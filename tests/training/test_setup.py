import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mars.checkpoint import read_info, read_json, read_tensors, write_json
from mars.config import from_dict
from mars.errors import CheckpointError, ConfigError
from mars.training.setup import Opened, open_stage
from mars.training.stages import StageConfig

Stage = Callable[..., dict[str, Any]]


def opened(table: dict[str, Any], **model: Any) -> Opened:
    """Opens a stage whose table `model` is replaced."""
    return open_stage(from_dict(StageConfig, table | {"model": model or table["model"]}))


def test_a_stage_continues_the_visual_expert_of_another_model(stage: Stage, tiny_model: Path) -> None:
    """And takes its LLM, its image tokenizer and its shapes."""
    found = opened(stage(), start_from=str(tiny_model))
    stored = read_tensors(tiny_model / "visual.safetensors")
    for name, weight in found.transformer.visual_tensors().items():
        assert torch.equal(weight, stored[name].float())
    info, shapes = read_info(tiny_model)
    assert found.transformer.config == shapes
    assert (found.info.language, found.info.language_digest) == (info.language, info.language_digest)
    assert found.info.name == "tiny"


def test_the_language_model_of_a_model_may_have_moved(
    stage: Stage, tiny_model: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_llm, tmp_path / "llm")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    write_json(model / "config.json", read_json(model / "config.json") | {"language": "gone/for/good"})
    found = opened(stage(), start_from=str(model), language=str(moved))
    assert found.info.language == str(moved)


def test_a_language_model_that_a_model_was_not_trained_with_is_refused(
    stage: Stage, tiny_model: Path, even_llm: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"was trained on the LLM sha256:.* but .* is sha256:"):
        opened(stage(), start_from=str(tiny_model), language=str(even_llm))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 8}, "needs an image tokenizer of 8x8 pixels per code, got 16x16; use the image tokenizer that"),
        ({"model": {"num_codes": 32}}, "needs an image tokenizer of 32 codes, got 64; use the image tokenizer that"),
    ],
)
def test_a_visual_expert_of_another_image_tokenizer_cannot_be_continued(
    stage: Stage, tiny_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    table = read_json(other / "config.json")
    write_json(other / "config.json", table | change | {"model": table["model"] | change.get("model", {})})
    with pytest.raises(CheckpointError, match=f"other {message}"):
        opened(stage(), start_from=str(other))


def test_a_grid_that_the_grid_embedding_does_not_know_is_refused(stage: Stage) -> None:
    model = stage()["model"]
    semvie = model["semvie"] | {"grid_embedding": True, "max_grid": 1}
    with pytest.raises(ConfigError, match="max_grid must be at least 3 for codes of 2x3, got 1"):
        opened(stage(), **model | {"semvie": semvie})


def test_a_grid_that_cells_do_not_fill_is_refused(stage: Stage) -> None:
    table = stage()
    cells = {"semvie": table["model"]["semvie"] | {"cell": 2}}
    with pytest.raises(ConfigError, match="cells of 2x2 codes must fill the grid, got 2x3"):
        opened(table, **table["model"] | cells)


def test_pictures_of_a_shard_come_as_often_in_an_epoch_as_it_is_repeated(stage: Stage) -> None:
    table = stage()
    once = opened(table).loaders
    thrice = opened(table | {"data": table["data"] | {"repeats": [3] * len(table["data"]["shards"])}}).loaders
    assert once is not None
    assert thrice is not None
    assert len(thrice.drawn) == 3 * len(once.drawn)
