import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mars import memory
from mars.checkpoint import load_model, read_json, read_tensors
from mars.config import from_dict
from mars.convert import init_model
from mars.errors import CheckpointError, ConfigError, MarsError, ModelError, RequestError
from mars.model.base_llm import open_base_llm
from mars.model.config import SemVIEConfig
from mars.pipeline import MarsPipeline
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer


def test_a_new_model_is_a_copy_of_the_llm_with_tables_at_the_mean(even_model: Path, even_llm: Path) -> None:
    llm, visual = open_base_llm(str(even_llm)).tensors, read_tensors(even_model / "visual.safetensors")
    experts = {name for name in visual if ".visual." in name}
    # Without the norms, which both experts share.
    assert experts == {
        name.replace("language", "visual") for name in llm if name.startswith("layers") and "norm" not in name
    }
    for name in experts:
        assert torch.equal(visual[name], llm[name.replace("visual", "language")].half()), name
    text = llm["language_embedding.weight"]
    tables = visual.keys() - experts
    assert tables == {
        "special_embedding.weight",
        "special_head.weight",
        "visual_embedding.weight",
        "visual_head.weight",
    }
    for name in tables:
        away = visual[name].float() - text.mean(dim=0)
        assert 0.5 < float(away.std() / text.std()) / 0.02 < 2, name
        assert len(visual[name].unique(dim=0)) == len(visual[name])


def test_a_new_model_says_what_it_is(even_model: Path, even_llm: Path) -> None:
    table = read_json(even_model / "config.json")
    assert (table["name"], table["grids"], table["factor"]) == ("even", [[2, 2]], 16)
    assert (table["language"], table["language_revision"]) == (str(even_llm.resolve()), None)
    assert table["language_digest"] == open_base_llm(str(even_llm)).digest
    assert sorted(path.name for path in even_model.iterdir()) == [
        "config.json", "image_tokenizer.json", "image_tokenizer.safetensors", "visual.safetensors",
    ]  # fmt: skip


def test_a_new_model_draws_writes_and_is_the_same_for_a_seed(
    even_model: Path, even_llm: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pipe = MarsPipeline.from_pretrained(even_model)
    assert pipe("a red apple", seed=1).images[0].size == (32, 32)
    assert isinstance(pipe.chat("hello", max_tokens=3), str)
    for name, seed in (("same", 0), ("other", 1)):
        init_model(tmp_path / name, language=str(even_llm), image_tokenizer=str(tiny_model), size=32, seed=seed)
    same, other = ((tmp_path / name / "visual.safetensors").read_bytes() for name in ("same", "other"))
    assert same == (even_model / "visual.safetensors").read_bytes() != other


def test_a_stage_continues_a_new_model_and_saves_it(
    even_model: Path, even_llm: Path, stage: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = {"language": str(even_llm), "image_tokenizer": str(even_model), "start_from": str(even_model)}
    trainer = Trainer(from_dict(StageConfig, stage(model=model, steps=2)))
    stored = load_file(even_model / "visual.safetensors")
    for name, weight in trainer.transformer.visual_tensors().items():
        assert torch.equal(weight, stored[name].float()), name
    trainer.train()
    trained = MarsPipeline.from_pretrained(tmp_path / "run" / "model")
    assert trained.model.visual_digest != load_model(even_model).visual_digest
    assert trained.model.info.language_digest == read_json(even_model / "config.json")["language_digest"]
    assert trained("a red apple", seed=1).images[0].size == (48, 32)  # of the shards


def test_a_stage_takes_its_shapes_from_the_model_that_it_starts_from(
    even_model: Path, stage: Callable[..., dict[str, Any]]
) -> None:
    model = {"start_from": str(even_model)}
    with pytest.raises(ConfigError, match=r"model\.semvie must be left out"):
        Trainer(from_dict(StageConfig, stage(model=model | {"semvie": {"visual_layers": [0]}})))


def test_a_stage_names_its_llm_wherever_it_is_started(
    tiny_llm: Path, stage: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = stage()
    monkeypatch.chdir(tiny_llm.parent)
    table["model"]["language"] = f"./{tiny_llm.name}"
    assert Trainer(from_dict(StageConfig, table)).info.language == str(tiny_llm.resolve())


@pytest.fixture
def moved(even_llm: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A self-contained model that was moved, and whose LLM is gone."""
    llm = shutil.copytree(even_llm, tmp_path / "llm")
    init_model(tmp_path / "a", language=str(llm), image_tokenizer=str(tiny_model), size=32, include_language=True)
    shutil.rmtree(llm)
    (tmp_path / "deep").mkdir()
    return (tmp_path / "a").rename(tmp_path / "deep" / "b")


def test_a_self_contained_model_can_be_moved(moved: Path, even_model: Path, tmp_path: Path) -> None:
    wanted, found = MarsPipeline.from_pretrained(even_model), MarsPipeline.from_pretrained(moved)
    for name, weight in found.model.transformer.named_parameters():
        assert torch.equal(weight, wanted.model.transformer.get_parameter(name)), name
    one, other = (pipe("a red apple", seed=1).images[0].tobytes() for pipe in (wanted, found))
    assert one == other
    assert wanted.chat("hello", max_tokens=5) == found.chat("hello", max_tokens=5)
    modes = {path.stat().st_mode & 0o777 for path in moved.rglob("*") if path.is_file()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_a_self_contained_model_stays_so_when_it_is_saved(moved: Path, tmp_path: Path) -> None:
    pipe = MarsPipeline.from_pretrained(moved)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(moved)  # over itself
    for folder in (tmp_path / "saved", moved):
        again = MarsPipeline.from_pretrained(folder)
        assert again.model.info.language == "./language"
        assert torch.equal(again("x", seed=3).codes, pipe("x", seed=3).codes)
        assert "The language model is not in this folder" not in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_another_llm_is_one_line_that_names_both(moved: Path, precision: Any) -> None:
    path = moved / "language" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path)
    wanted, found = read_json(moved / "config.json")["language_digest"], open_base_llm(str(moved / "language")).digest
    with pytest.raises(CheckpointError) as caught:
        load_model(moved, precision=precision)
    for part in ("a was trained on the LLM", wanted[:19], "but ./language is", found[:19]):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_reaches_out_of_its_folder_is_refused(moved: Path) -> None:
    table = read_json(moved / "config.json")
    (moved / "config.json").write_text(json.dumps(table | {"language": "./language/../../x"}))
    with pytest.raises(CheckpointError, match=r"must not leave the model's own folder"):
        load_model(moved)


@pytest.fixture
def folders(tmp_path: Path, even_llm: Path) -> Path:
    """What is no LLM, no image tokenizer, or not empty."""
    (tmp_path / "empty").mkdir()
    shutil.copytree(even_llm, tmp_path / "gpt2")
    fields = read_json(even_llm / "config.json") | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(fields))
    shutil.copytree(even_llm, tmp_path / "endless")
    fields = {name: value for name, value in read_json(even_llm / "config.json").items() if "token_id" not in name}
    (tmp_path / "endless" / "config.json").write_text(json.dumps(fields))
    (tmp_path / "other").mkdir()
    save_file({"x": torch.ones(3)}, tmp_path / "other" / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"language": "nowhere.gguf"}, ModelError, "must be a file, folder, hub id or package:NAME, got nowhere.gguf"),
        ({"language": "./nowhere"}, ModelError, "no such file"),
        ({"language": "empty"}, ModelError, "must hold config.json, got none"),
        ({"language": "gpt2"}, ModelError, "architecture must be one of .* got GPT2LMHeadModel; use another model"),
        ({"language": "endless"}, ModelError, "must have an end-of-text token, got none"),
        ({"image_tokenizer": "./nowhere"}, ModelError, "must be a folder, a file or a hub id, got ./nowhere"),
        ({"image_tokenizer": "empty"}, ModelError, "must hold a file of weights"),
        ({"image_tokenizer": "other"}, CheckpointError, "other/model.safetensors"),
        ({"size": 40}, RequestError, "multiple of 16, the image tokenizer's factor, got 40"),
        ({"size": 0}, RequestError, "multiple of 16, the image tokenizer's factor, got 0"),
        ({"size": 16 * 14}, RequestError, "fewer than the LLM's 192 positions, got 14x14"),
        ({"semvie": {"visual_width": 16}}, ConfigError, "share_norms needs visual_width 32 .* set share_norms = false"),
        ({"semvie": {"visual_layers": (3,)}}, ConfigError, "visual_layers must lie in 0..2, got 3"),
        ({"semvie": {"grid_embedding": True, "max_grid": 1}}, ConfigError, "max_grid must be at least 2 for codes"),
        ({"out": "gpt2"}, CheckpointError, "must be new or empty, as what is there would be lost"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_become_a_model_is_one_line_and_leaves_nothing(
    folders: Path, even_llm: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any], kind: type[MarsError], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    asked: dict[str, Any] = {"language": str(even_llm), "image_tokenizer": str(tiny_model), "size": 32} | options
    if "semvie" in asked:
        asked["semvie"] = SemVIEConfig(**asked["semvie"])
    with pytest.raises(kind, match=message) as caught:
        init_model(Path(asked.pop("out", "new")), **asked)
    assert "\n" not in str(caught.value)
    assert sorted(folders.rglob("*")) == before


def test_too_little_memory_is_said_first(
    even_llm: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 1 kB")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(ModelError, match=r"the visual expert needs .* are free; choose fewer visual_layers"):
        init_model(tmp_path / "new", language=str(even_llm), image_tokenizer=str(tiny_model), size=32)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    even_llm: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mars.model.hub_export.shutil.copyfile", no_space)
    with pytest.raises(CheckpointError, match="cannot write .*new: the disk is full; nothing was written"):
        init_model(
            tmp_path / "new", language=str(even_llm), image_tokenizer=str(tiny_model), size=32, include_language=True
        )
    assert list(tmp_path.iterdir()) == []
