import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mars.adapter import CONFIG, WEIGHTS, adapt, load_adapted, read_adapter, save_adapter, visual_digest
from mars.checkpoint import load_model, read_tensors
from mars.errors import CheckpointError, ConfigError, RequestError
from mars.model.lora import LoraConfig, adapter_of, add_lora, lora_tensors, merged
from mars.model.quantized import QuantizedLinear, dequantize
from mars.model.transformer import MarsTransformer
from tests.model.conftest import codes_logits, train_adapter


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, MarsTransformer]]:
    """Writes a trained adapter of a model; returns its folder and the model with it."""

    def written(model: Path, **config: Any) -> tuple[Path, MarsTransformer]:
        folder, settings = tmp_path / "adapter", LoraConfig(**({"rank": 3} | config))
        transformer = load_model(model).transformer
        digest = visual_digest(transformer.visual_tensors())
        add_lora(transformer, settings, generator=torch.Generator().manual_seed(0))
        train_adapter(transformer)
        folder.mkdir(exist_ok=True)
        save_adapter(folder, adapter_of(lora_tensors(transformer), settings, base_digest=digest), settings, base="tiny")
        return folder, transformer

    return written


def test_what_is_read_is_what_was_written(tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]) -> None:
    folder, transformer = write(tiny_model, alpha=5.0)
    found, wanted = read_adapter(folder), adapter_of(lora_tensors(transformer), LoraConfig(rank=3, alpha=5.0))
    assert (found.name, found.scale) == (str(folder), wanted.scale)
    assert found.base_digest == visual_digest(read_tensors(tiny_model / "visual.safetensors"))
    assert found.pairs.keys() == wanted.pairs.keys()
    for name, pair in found.pairs.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, wanted.pairs[name], strict=True))


def test_peft_gives_what_ours_gives_from_our_file(
    tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    from peft import PeftModel

    folder, ours = write(tiny_model, alpha=5.0)
    theirs = load_model(tiny_model).transformer
    before = codes_logits(theirs)
    wrapped = PeftModel.from_pretrained(theirs, str(folder))
    assert torch.allclose(codes_logits(theirs), codes_logits(ours), atol=1e-5)
    assert not torch.allclose(codes_logits(theirs), before, atol=1e-2)
    kept = {name for name, _ in wrapped.base_model.model.named_parameters() if ".lora_A." in name}
    assert len(kept) == len(read_adapter(folder).pairs)


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_gives_what_peft_gives_from_its_file(tiny_model: Path, tmp_path: Path, rslora: bool) -> None:
    import peft

    theirs = load_model(tiny_model).transformer
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*\.visual\.(q_proj|down_proj)", use_rslora=rslora, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(theirs, config)
    wanted = codes_logits(theirs)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapted(tiny_model, tmp_path / "theirs").transformer
    assert torch.allclose(codes_logits(ours), wanted, atol=1e-5)
    assert not torch.allclose(codes_logits(load_model(tiny_model).transformer), wanted, atol=1e-3)


def test_a_model_that_is_open_is_adapted_as_one_that_is_opened_so(
    tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    folder, transformer = write(tiny_model)
    opened = load_adapted(tiny_model, folder, scale=0.5)
    adapted = adapt(load_model(tiny_model), folder, scale=0.5)
    assert torch.equal(codes_logits(opened.transformer), codes_logits(adapted.transformer))
    assert opened.visual_digest == adapted.visual_digest
    assert opened.lora == adapted.lora == "adapter x 0.5"
    whole = load_adapted(tiny_model, folder).transformer
    assert torch.allclose(codes_logits(whole), codes_logits(transformer), atol=1e-4)
    off = load_adapted(tiny_model, folder, scale=0.0).transformer
    assert torch.equal(codes_logits(off), codes_logits(load_model(tiny_model).transformer))


def test_a_base_that_is_stored_in_fp32_is_not_changed(
    tiny_model: Path, tmp_path: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    """As the checkpoints of a run are; its file is mapped into memory."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    file = base / "visual.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    before = file.read_bytes()
    folder, transformer = write(base)
    assert torch.allclose(codes_logits(load_adapted(base, folder).transformer), codes_logits(transformer), atol=1e-4)
    assert file.read_bytes() == before


def test_another_scale_or_adapter_is_another_digest(
    tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    digests = {load_model(tiny_model).visual_digest}
    for alpha in (1.0, 2.0):
        folder, _ = write(tiny_model, alpha=alpha)
        digests |= {load_adapted(tiny_model, folder, scale=scale).visual_digest for scale in (1.0, 0.7)}
    assert len(digests) == 5


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounding_comes_after_merging(
    even_model: Path, write: Callable[..., tuple[Path, MarsTransformer]], precision: Any
) -> None:
    folder, _ = write(even_model)
    stored = read_tensors(even_model / "visual.safetensors")
    wanted = dict(merged(stored, read_adapter(folder)))["layers.1.visual.q_proj.weight"].float()
    transformer = load_adapted(even_model, folder, precision=precision).transformer
    layer = transformer.get_submodule("layers.1.visual.q_proj")
    assert isinstance(layer, QuantizedLinear)
    found = dequantize(layer.codes, layer.scales, bits=layer.bits)[: len(wanted)]
    step = float(wanted.abs().max()) / (127 if precision == "int8" else 7)
    assert float((found - wanted).abs().max()) <= step
    assert float((found - stored["layers.1.visual.q_proj.weight"].float()).abs().max()) > 3 * step


def test_an_adapter_of_another_model_is_one_line(
    tiny_model: Path, tmp_path: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    folder, _ = write(tiny_model)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "visual.safetensors")
    tensors["visual_norm.weight"] += 1
    save_file(tensors, other / "visual.safetensors")
    with pytest.raises(
        CheckpointError, match=r"adapter was trained on the visual expert sha256:.*, but .*'s is sha256"
    ):
        load_adapted(other, folder)
    model = load_model(other)
    before = codes_logits(model.transformer)
    with pytest.raises(CheckpointError, match="was trained on the visual expert"):
        adapt(model, folder)
    assert torch.equal(codes_logits(model.transformer), before)


def test_a_run_and_the_model_made_of_it_have_one_digest() -> None:
    weight = torch.randn(4, 4)
    assert visual_digest({"a": weight}) == visual_digest({"a": weight.half()})


def test_a_model_takes_one_adapter_in_fp32(
    even_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    folder, _ = write(even_model)
    with pytest.raises(RequestError, match="these are rounded to int8; open the model with it"):
        adapt(load_model(even_model, precision="int8"), folder)
    with pytest.raises(RequestError, match="these are those of adapter x 1 already"):
        adapt(load_adapted(even_model, folder), folder)
    with pytest.raises(RequestError, match="lora_scale must be a finite number, 1 as trained, got nan"):
        load_adapted(even_model, folder, scale=float("nan"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_one_line(
    tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]], name: str
) -> None:
    folder, _ = write(tiny_model)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"no LoRA adapter at .*adapter: .*, {name} is missing"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, r"must have the rank r = 4 of adapter_config.json, but layers\.0\.visual\.\w+ has matrices of 3x"),
        ({"r": "8"}, "must be of peft_type LORA with numbers r and lora_alpha, got 'LORA', '8' and 16.0"),
        ({"peft_type": "LOHA"}, "must be of peft_type LORA"),
        ({"use_dora": True}, "use_dora must be False, got True; only plain LoRA is read"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern must be {}"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]], change: dict[str, Any], message: str
) -> None:
    folder, _ = write(tiny_model)
    table = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(table | change), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def test_damaged_weights_are_one_line(tiny_model: Path, write: Callable[..., tuple[Path, MarsTransformer]]) -> None:
    folder, _ = write(tiny_model)
    good = load_file(folder / WEIGHTS)
    name = next(iter(good))
    other = name.replace("lora_A", "lora_C").replace("lora_B", "lora_C")
    language = {key.replace(".visual.", ".language."): tensor for key, tensor in good.items()}
    for tensors, message in (
        ({key: tensor for key, tensor in good.items() if key != name}, "must hold lora_A and lora_B of"),
        ({**good, other: good[name].clone()}, "must adapt the visual expert's linear layers only, got base_model"),
        (language, "must adapt the visual expert's linear layers only, got base_model"),
        ({**good, name: good[name] * float("nan")}, "holds NaN or infinity"),
        ({}, "must hold at least one adapted layer"),
    ):
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(folder)
    (folder / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_adapter(folder)


def test_a_missing_model_or_unknown_precision_is_said_by_the_model(
    tiny_model: Path, tmp_path: Path, write: Callable[..., tuple[Path, MarsTransformer]]
) -> None:
    folder, _ = write(tiny_model)
    precision: Any = "int2"
    with pytest.raises(ConfigError, match="precision must be one of"):
        load_adapted(tiny_model, folder, precision=precision)
