import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.average_models import main
from mars.checkpoint import load_image_tokenizer, load_model, read_json, read_tensors, save_model, write_json
from mars.errors import CheckpointError, ModelError
from mars.pipeline import MarsPipeline


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with other weights, and a decoder of its own."""
    model = load_model(tiny_model)
    with torch.no_grad():
        for weight in model.transformer.visual_tensors().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        model.image_tokenizer.decoder.conv_out.weight.mul_(1.5)
    (tmp_path / "other").mkdir()
    save_model(
        tmp_path / "other", info=model.info, transformer=model.transformer, image_tokenizer=model.image_tokenizer
    )
    return tmp_path / "other"


@pytest.mark.parametrize("share", ["0", "0.25", "1"])
def test_every_weight_is_between(tiny_model: Path, other: Path, tmp_path: Path, share: str) -> None:
    main([str(tiny_model), str(other), "--share", share, "--out", str(tmp_path / "mean")])
    before, after, found = (
        read_tensors(folder / "visual.safetensors") for folder in (tiny_model, other, tmp_path / "mean")
    )
    assert found.keys() == before.keys()
    for name in found:
        wanted = (1 - float(share)) * before[name].float() + float(share) * after[name].float()
        torch.testing.assert_close(found[name].float(), wanted, rtol=1e-3, atol=1e-6)
        assert not torch.equal(before[name], after[name])
    decoders = [load_image_tokenizer(folder)[1]["decoder.conv_out.weight"] for folder in (other, tmp_path / "mean")]
    assert torch.equal(*decoders)
    pipe = MarsPipeline.from_pretrained(tmp_path / "mean")
    assert pipe("a", seed=0).images[0].size == pipe.sizes[0]


def test_only_models_alike_have_a_mean(
    tiny_model: Path, tiny_upscaler: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean"
    with pytest.raises(ModelError, match="differ in shapes; only models alike"):
        main([str(tiny_model), str(tiny_upscaler), "--out", str(out)])
    model = load_model(other)
    with torch.no_grad():
        model.image_tokenizer.quantizer.embedding.weight.mul_(2)
    shutil.rmtree(other)
    other.mkdir()
    save_model(other, info=model.info, transformer=model.transformer, image_tokenizer=model.image_tokenizer)
    with pytest.raises(ModelError, match="differ in codes; only models alike"):
        main([str(tiny_model), str(other), "--out", str(out)])
    llm = tmp_path / "llm"
    shutil.copytree(tiny_model, llm)
    write_json(llm / "config.json", read_json(llm / "config.json") | {"language_digest": "sha256:another"})
    with pytest.raises(ModelError, match="differ in LLM; only models alike"):
        main([str(tiny_model), str(llm), "--out", str(out)])
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    (damaged / "visual.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        main([str(damaged), str(tiny_model), "--out", str(out)])
    with pytest.raises(SystemExit):
        main([str(tiny_model), str(tiny_model), "--share", "1.5", "--out", str(out)])
    assert "--share must be from 0 to 1, got 1.5" in capsys.readouterr().err
    assert not out.exists()
