import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mars.checkpoint import is_whole_model, read_json, write_json
from mars.convert import open_image_tokenizer
from mars.errors import ModelError
from mars.hub import hub_folder, is_hub_id
from mars.pipeline import MarsPipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Cached = Callable[..., Path]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Puts a copy of a folder where the hub's client looks for `someone/NAME` at main and v1; returns the copy.

    `known` are files that the client knows the hub to have; whether they are in the cache is another matter.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))

    def laid_out(folder: Path, name: str = "tiny", *, known: tuple[str, ...] = ()) -> Path:
        place = tmp_path / "hf" / f"models--someone--{name}"
        snapshot = Path(shutil.copytree(folder, place / "snapshots" / COMMIT))
        (place / "refs").mkdir()
        for branch in ("main", "v1"):
            (place / "refs" / branch).write_text(COMMIT)
        if known:
            (place / "trees").mkdir()
            files = {file: {"size": 1, "blob_id": "0" * 40} for file in known}
            write_json(place / "trees" / f"{COMMIT}.json", {"format_version": 1, "files": files})
        return snapshot

    return laid_out


@pytest.fixture
def whole(tiny_model: Path, tiny_llm: Path, tmp_path: Path) -> Path:
    """The tiny model with its LLM in its own folder."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "whole"))
    shutil.copytree(tiny_llm, folder / "language")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"language": "./language"})
    return folder


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("Qwen/Qwen2.5-0.5B", True), ("a/b", True), ("_a/b.c", True), ("./model", False), ("../model", False),
        ("a", False), ("a/b/c", False), ("/a/b", False), ("a/", False), ("a/..", False), ("a/b\n", False),
        ("某/模型", False), ("package:a", False),
    ],
)  # fmt: skip
def test_an_id_is_an_owner_and_a_name(source: str, wanted: bool) -> None:
    assert is_hub_id(source) is wanted


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_model_with_its_llm_opens_offline_from_the_hubs_cache(
    cached: Cached, whole: Path, pipe: MarsPipeline, revision: str | None
) -> None:
    cached(whole)
    found = MarsPipeline.from_pretrained("someone/tiny", revision=revision)
    assert torch.equal(found("a red apple", seed=1).codes, pipe("a red apple", seed=1).codes)


def test_what_is_not_there_offline_is_one_line(cached: Cached, whole: Path) -> None:
    folder = cached(whole)
    assert is_whole_model(folder)
    for source, revision in (("someone/tiny", "v2"), ("someone/other", None), ("some--one/tiny", None)):
        at = " at v2" if revision else ""
        with pytest.raises(ModelError, match=f"^model {source}{at} is neither in the hub's cache nor can") as caught:
            MarsPipeline.from_pretrained(source, revision=revision)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    (folder / "language" / "model.safetensors").unlink()
    assert not is_whole_model(folder)
    with pytest.raises(ModelError, match=r"must hold model\.safetensors or|neither in the hub's cache nor") as caught:
        MarsPipeline.from_pretrained("someone/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "visual.safetensors", "image_tokenizer.json", "language/config.json"])
def test_a_folder_without_one_of_its_files_is_not_whole(whole: Path, name: str) -> None:
    assert is_whole_model(whole)
    (whole / name).unlink()
    assert not is_whole_model(whole)


def test_files_of_other_folders_and_kinds_are_not_asked_for(cached: Cached, whole: Path) -> None:
    others = ("onnx/model.safetensors", "pytorch_model.bin", "text_encoder/config.json", "run.py", "language/x/a.bin")
    here = tuple(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    cached(whole, known=(*here, *others))
    asked = {"revision": None, "is_whole": is_whole_model}
    assert hub_folder("someone/tiny", **asked, subfolders=("language",)).name == COMMIT  # type: ignore[arg-type]
    cached(whole, "cut", known=(*here, "language/model-2.safetensors"))
    assert hub_folder("someone/cut", **asked).name == COMMIT  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="neither in the hub's cache nor"):
        hub_folder("someone/cut", **asked, subfolders=("language",))  # type: ignore[arg-type]


def test_an_image_tokenizer_opens_offline_from_the_hubs_cache(cached: Cached, tiny_model: Path, tmp_path: Path) -> None:
    cached(tiny_model)
    assert open_image_tokenizer("someone/tiny").config.num_codes == 64
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.json").write_text("{}")
    cached(tmp_path / "nothing", "nothing")
    with pytest.raises(ModelError, match="must hold a file of weights|neither in the hub's cache nor"):
        open_image_tokenizer("someone/nothing")


PUSH = """
import json, sys
from mars import MarsError, MarsPipeline
pipe = MarsPipeline.from_pretrained(sys.argv[1])
for name in ("someone/tiny", "not a name"):
    try:
        pipe.push_to_hub(name, revision="new")
    except MarsError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_hub_that_cannot_be_reached_or_refuses_is_one_line_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "temporary").mkdir()
    with socket.socket() as closed:  # bound and not listening: nobody else gets this port, and it refuses
        closed.bind(("127.0.0.1", 0))
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "none",
            "TMPDIR": str(tmp_path / "temporary"),
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, "-c", PUSH, str(tiny_model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["ModelError", "ModelError"]
    for (_, message), name in zip(lines, ("someone/tiny", "not a name"), strict=True):
        assert message.startswith(f"{name} cannot be written on the hub: ")
        assert message.endswith("; log in, or check the name")
        assert "\n" not in message
    assert list((tmp_path / "temporary").glob("tmp*")) == []
