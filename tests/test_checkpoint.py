import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars import checkpoint, memory
from mars.checkpoint import (
    check_tensors,
    load_image_tokenizer,
    load_into,
    load_model,
    read_json,
    read_tensors,
    save_image_tokenizer,
    save_tensors,
    stored_digest,
    write_json,
)
from mars.errors import CheckpointError, ModelError
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.base_llm import open_base_llm
from mars.model.language_tensors import tensors_digest
from mars.model.precision import weights_held
from tests.conftest import files_end_at

OLD = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
NEW = {"a": torch.randn(400, 30)}


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    save_tensors(tmp_path / "none.safetensors", {})
    assert read_tensors(tmp_path / "none.safetensors") == {}
    tensors = {**OLD, "c": torch.randn(3, 2).T, "d": torch.randn(4).bfloat16(), "e": nn.Parameter(torch.ones(2))}
    save_tensors(path, tensors, {"step": "3"})
    found = read_tensors(path)
    assert same(found, {**tensors, "e": torch.ones(2)})
    assert found["d"].dtype == torch.bfloat16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("owner_and_function", [(checkpoint, "save_file"), (os, "replace")], ids=["write", "move"])
def test_a_full_disk_leaves_the_old_tensors_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner_and_function: tuple[ModuleType, str]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, OLD)
    owner, function = owner_and_function
    monkeypatch.setattr(owner, function, no_space)
    with pytest.raises(CheckpointError, match=r"cannot write .*: the disk is full; nothing was written") as caught:
        save_tensors(path, NEW)
    assert "\n" not in str(caught.value)
    assert same(read_tensors(path), OLD)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_write_that_the_system_cuts_short_leaves_the_old_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, OLD)
    with files_end_at(8192), pytest.raises(CheckpointError, match="cannot write .*; nothing was written"):
        save_tensors(path, NEW)
    assert same(read_tensors(path), OLD)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_json_survives_a_file_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"name": "花", "sizes": [1, 2]})
    assert "花" in path.read_text("utf-8")
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_json(path, {"name": "other"})
    assert read_json(path) == {"name": "花", "sizes": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json in"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_bad_json_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def cut(content: bytes) -> bytes:
    return content[:-4]


def cut_in_the_header(content: bytes) -> bytes:
    return content[:20]


def nothing(content: bytes) -> bytes:
    return b""


def text(content: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("damage", [cut, cut_in_the_header, nothing, text])
def test_a_damaged_file_of_tensors_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, OLD)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_tensors_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        read_tensors(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "missing weight"),
        ({"extra": torch.ones(1)}, "unknown extra"),
        ({"weight": torch.ones(3, 2)}, r"weight must be \[2, 3\], got \[3, 2\]"),
        ({"weight": torch.full((2, 3), torch.nan)}, "weight holds NaN or infinity"),
        ({"bias": torch.tensor([0, torch.inf])}, "bias holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_not_loaded(change: dict[str, Tensor | None], message: str) -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    mixed = {"weight": torch.ones(2, 3), "bias": torch.ones(2), **change}
    tensors = {name: tensor for name, tensor in mixed.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"here does not fit its configuration: {message}") as caught:
        load_into(module, tensors, where="here")
    assert "\n" not in str(caught.value)
    assert same(module.state_dict(), before)


def test_many_differences_are_counted() -> None:
    found = {f"t{index}": torch.ones(1) for index in range(9)}
    with pytest.raises(CheckpointError, match="unknown t0; unknown t1; unknown t2 and 6 more"):
        check_tensors(found, {}, where="here")


def test_loading_keeps_the_modules_dtype() -> None:
    module = nn.Linear(3, 2).double()
    load_into(module, {"weight": torch.ones(2, 3).bfloat16(), "bias": torch.zeros(2)}, where="here")
    assert module.weight.dtype == torch.float64
    assert torch.equal(module.weight, torch.ones(2, 3, dtype=torch.float64))


def test_a_saved_file_of_tensors_is_as_readable_as_any_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "new" / "a.safetensors", OLD)
    (tmp_path / "new" / "plain").touch()
    assert (tmp_path / "new" / "a.safetensors").stat().st_mode == (tmp_path / "new" / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_tensors(tmp_path / "file" / "weights.safetensors", OLD)


def test_the_digest_changes_with_any_byte_name_shape_or_dtype() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2), "empty": torch.zeros(0), "scalar": torch.tensor(1.5)}
    assert tensors_digest(base) == tensors_digest(dict(reversed(base.items())))
    assert tensors_digest(base) == tensors_digest({**base, "a": nn.Parameter(torch.arange(6.0))})
    assert tensors_digest({"a": base["a"].view(2, 3).T.contiguous().T}) == tensors_digest({"a": base["a"].view(2, 3)})
    digests = {tensors_digest(base)}
    digests.add(tensors_digest({**base, "a": base["a"].view(2, 3)}))
    digests.add(tensors_digest({**base, "b": torch.zeros(2, dtype=torch.int32)}))
    digests.add(tensors_digest({name: tensor for name, tensor in base.items() if name != "empty"}))
    digests.add(tensors_digest({("c" if name == "b" else name): tensor for name, tensor in base.items()}))
    raw = base["a"].view(torch.uint8)
    for index in range(len(raw)):
        changed = raw.clone()
        changed[index] ^= 1
        digests.add(tensors_digest({**base, "a": changed.view(torch.float32)}))
    assert len(digests) == 5 + len(raw)


def test_the_digest_reads_half_precision() -> None:
    assert tensors_digest({"a": torch.ones(3).bfloat16()}) != tensors_digest({"a": torch.ones(3).half()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 32}, "needs an image tokenizer of 64 codes, got 32; use the image tokenizer that"),
        ({"patch": 8}, "needs an image tokenizer of 16x16 pixels per code, got 8x8; use the image tokenizer that"),
    ],
)
def test_a_model_with_an_image_tokenizer_of_another_kind_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"factor": 16})
    load_model(folder)
    theirs = load_image_tokenizer(folder)[0].config
    save_image_tokenizer(folder, ImageTokenizer(replace(theirs, **changes)))
    with pytest.raises(CheckpointError, match=f"model {message}"):
        load_model(folder)


def test_a_folder_that_does_not_know_its_factor_still_loads(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    table = read_json(tmp_path / "model" / "config.json")
    del table["factor"]
    write_json(tmp_path / "model" / "config.json", table)
    assert load_model(tmp_path / "model").info.factor is None


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_memory_is_checked_before_weights_are_read(
    even_model: Path, even_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, half: bool
) -> None:
    llm = Path(shutil.copytree(even_llm, tmp_path / "llm"))
    if half:  # an LLM that must be made fp32 takes memory, others stay in their files
        path = llm / "model.safetensors"
        save_tensors(path, {name: tensor.half() for name, tensor in read_tensors(path).items()})
    model = Path(shutil.copytree(even_model, tmp_path / "model"))
    table = {"language": str(llm), "language_digest": open_base_llm(str(llm)).digest}
    write_json(model / "config.json", read_json(model / "config.json") | table)
    transformer = load_model(model, precision=precision).transformer
    held = weights_held(transformer)
    wanted = held["visual"][1] + (held["language"][1] if half or precision == "int4" else 0)
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    meminfo.write_text(f"MemAvailable: {wanted // 1024 + 1} kB")
    load_model(model, precision=precision)
    meminfo.write_text(f"MemAvailable: {int(wanted * 0.93) // 1024} kB")
    with pytest.raises(ModelError, match=rf"^even in {precision} needs 0.0 GB of memory, 0.0 GB are free; "):
        load_model(model, precision=precision)


def test_the_digest_of_a_folder_is_that_of_the_opened_model(tiny_model: Path, tmp_path: Path) -> None:
    assert load_model(tiny_model).visual_digest == stored_digest(tiny_model)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = read_tensors(folder / "image_tokenizer.safetensors")
    tensors["decoder.conv_out.bias"][0] += 1
    save_tensors(folder / "image_tokenizer.safetensors", tensors)
    assert stored_digest(folder) != stored_digest(tiny_model)
