"""The nodes, loaded and called as ComfyUI does, against a server of the tiny model."""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mars.pipeline import MarsPipeline
from mars.server.settings import Keys, Limits, Settings
from tests.server.conftest import Running, running

FOLDER = Path(__file__).parents[3] / "integrations" / "comfyui"
TYPES = {"STRING": str, "INT": int, "FLOAT": float}


@pytest.fixture(scope="module")
def nodes() -> Iterator[ModuleType]:
    """A folder of custom_nodes is a module that is named by its path and executed."""
    name = str(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[name])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    with running(MarsPipeline.from_pretrained(tiny_model), Settings(limits=Limits(images=4))) as found:
        yield found


def call(node: type, **given: Any) -> tuple[Any, ...]:
    """Widgets that are not given have their defaults, as in ComfyUI's page."""
    inputs = node.INPUT_TYPES()  # type: ignore[attr-defined]
    values = {}
    for name, (kind, *options) in {**inputs["required"], **inputs.get("optional", {})}.items():
        if name in given:
            values[name] = given[name]
        elif isinstance(kind, list):
            values[name] = kind[0]
        else:
            values[name] = options[0]["default"]
    result = getattr(node(), node.FUNCTION)(**values)  # type: ignore[attr-defined]
    assert isinstance(result, tuple)
    assert len(result) == len(node.RETURN_TYPES)  # type: ignore[attr-defined]
    return result


def check_images(images: torch.Tensor, count: int, server: Running) -> None:
    width, height = server.worker.pipe.sizes[0]
    assert images.shape == (count, height, width, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_each_node_has_what_comfyui_asks_for(nodes: ModuleType) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional", "hidden"}
        assert set(node.RETURN_TYPES) <= {"IMAGE", "STRING"}
        assert isinstance(node.CATEGORY, str)
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        free = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        for name, (kind, *options) in {**inputs["required"], **inputs["optional"]}.items():
            assert free or name in parameters
            if isinstance(kind, list):
                assert all(isinstance(option, str) for option in kind)
            elif kind in TYPES:
                (table,) = options
                assert type(table["default"]) is TYPES[kind]
                assert table.get("min", table["default"]) <= table["default"] <= table.get("max", table["default"])
            else:
                assert (kind, options) in [("IMAGE", []), ("MASK", [])]


def test_what_the_widgets_begin_with_is_how_the_pipeline_draws(nodes: ModuleType, server: Running) -> None:
    from mars.pipeline.orders import DEFAULT_SAMPLING

    widgets = nodes.MarsTextToImage.INPUT_TYPES()["optional"]
    assert {
        name: widgets[name][1]["default"] for name in ("guidance_scale", "temperature", "top_k", "top_p", "candidates")
    } == {
        "guidance_scale": DEFAULT_SAMPLING.guidance,
        "temperature": DEFAULT_SAMPLING.temperature,
        "top_k": DEFAULT_SAMPLING.top_k,
        "top_p": DEFAULT_SAMPLING.top_p,
        "candidates": DEFAULT_SAMPLING.candidates,
    }


def test_a_prompt_becomes_a_batch_that_its_seed_decides(nodes: ModuleType, server: Running) -> None:
    asked = {"server": server.url, "prompt": "a", "batch_size": 2, "candidates": 1}
    (images,) = call(nodes.MarsTextToImage, seed=1, **asked)
    (again,) = call(nodes.MarsTextToImage, seed=1, **asked)
    (other,) = call(nodes.MarsTextToImage, seed=2, **asked)
    check_images(images, 2, server)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    (alone,) = call(nodes.MarsTextToImage, seed=1, **asked | {"batch_size": 1})
    assert (images[0] - alone[0]).abs().max() < 2 / 255  # decoded together, pixels round otherwise


def test_an_edit_changes_what_is_masked_and_keeps_the_rest(nodes: ModuleType, server: Running) -> None:
    width, height = server.worker.pipe.sizes[0]
    images = (torch.rand(2, height, width, 3) * 255).round() / 255
    mask = torch.zeros(1, height, width)
    mask[:, height // 2 :] = 1
    (edited,) = call(nodes.MarsEdit, image=images, mask=mask, prompt="a", seed=1, server=server.url)
    check_images(edited, 2, server)
    kept = height // 2 - 8  # at the seam pixels are mixed
    assert torch.equal(edited[:, :kept], images[:, :kept])
    assert not torch.equal(edited[:, height // 2 :], images[:, height // 2 :])
    each = torch.stack([mask[0], mask[0]])
    assert torch.equal(call(nodes.MarsEdit, image=images, mask=each, prompt="a", seed=1, server=server.url)[0], edited)


def test_a_mask_of_another_size_is_fitted_and_one_too_many_refused(nodes: ModuleType, server: Running) -> None:
    images = torch.rand(1, 30, 70, 3)
    asked = {"image": images, "prompt": "a", "seed": 1, "server": server.url}
    check_images(call(nodes.MarsEdit, mask=torch.ones(64, 64), **asked)[0], 1, server)
    with pytest.raises(ValueError, match="one mask, or one for each of 1 pictures, got 2"):
        call(nodes.MarsEdit, mask=torch.ones(2, 30, 70), **asked)


def test_every_picture_gets_a_caption(nodes: ModuleType, server: Running) -> None:
    (captions,) = call(nodes.MarsCaption, image=torch.rand(2, 40, 50, 3), server=server.url)
    assert nodes.MarsCaption.OUTPUT_IS_LIST == (True,)
    assert len(captions) == 2
    assert all(isinstance(text, str) for text in captions)


def test_a_refusal_is_the_servers_line_and_a_missing_server_is_told(nodes: ModuleType, server: Running) -> None:
    with pytest.raises(RuntimeError, match=r"refused \(400\): n must be at most 4, got 5"):
        call(nodes.MarsTextToImage, prompt="a", batch_size=5, server=server.url)
    with pytest.raises(RuntimeError, match=r"no MARS server at http://127.0.0.1:9: .*; start one with `mars serve`"):
        call(nodes.MarsTextToImage, prompt="a", server="http://127.0.0.1:9")


def test_the_key_comes_from_the_environment(
    nodes: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(MarsPipeline.from_pretrained(tiny_model), Settings(keys=Keys(["key"]))) as locked:
        with pytest.raises(RuntimeError, match=r"refused \(401\)"):
            call(nodes.MarsTextToImage, prompt="a", server=locked.url)
        monkeypatch.setenv("MARS_API_KEY", "key")
        assert len(call(nodes.MarsTextToImage, prompt="a", server=locked.url)[0]) == 1
