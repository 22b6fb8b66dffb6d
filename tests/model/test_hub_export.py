import json
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mars.errors import ModelError
from mars.model import hub_export
from mars.model.base_llm import BaseLLM, open_base_llm
from mars.model.config import LanguageConfig, ModelConfig, RopeScaling
from mars.model.hub_config import hub_config
from mars.model.hub_export import hub_fields, save_language
from mars.model.transformer import build_transformer
from mars.sequence.layout import text_segment

WriteGGUF = Callable[..., tuple[Path, dict[str, np.ndarray]]]
WriteHub = Callable[..., tuple[Path, dict[str, torch.Tensor]]]
SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=2.5),
    "llama3": RopeScaling(
        kind="llama3", factor=8.0, original_positions=64, low_frequency=1.5, high_frequency=5.0
    ),
    "yarn": RopeScaling(
        kind="yarn", factor=4.0, original_positions=32, beta_fast=20.0, beta_slow=2.0, truncate=False,
        attention_factor=1.25,
    ),
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"qkv_bias": True},
    "Qwen3": {"qk_norm": True, "head_width": 24},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_survive_the_hubs_words(tiny_config: LanguageConfig, family: str, scaling: str) -> None:
    for tied in (True, False):
        config = replace(
            tiny_config, rope_scaling=SCALINGS[scaling], tied_embeddings=tied, rope_theta=5e5, **FAMILIES[family]
        )
        fields = json.loads(json.dumps(hub_fields(config)))
        assert fields["architectures"] == [f"{family}ForCausalLM"]
        assert hub_config(fields, source="test") == config


def test_shapes_without_a_word_are_one_line(tiny_config: LanguageConfig) -> None:
    with pytest.raises(ModelError, match="both biases and norms of queries has no layout on the hub"):
        hub_fields(replace(tiny_config, qkv_bias=True, qk_norm=True))
    own = RopeScaling(kind="factors", factors=(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ModelError, match="factors of their own has no layout on the hub; keep its GGUF file"):
        hub_fields(replace(tiny_config, rope_scaling=own))


def fused(llm: BaseLLM) -> BaseLLM:
    """The same with queries, keys and values as views of one storage, as a first Qwen's files give them."""
    tensors = dict(llm.tensors)
    for layer in range(llm.config.num_layers):
        for kind in ("weight", "bias"):
            names = [f"layers.{layer}.language.{part}_proj.{kind}" for part in "qkv"]
            rows = [len(tensors[name]) for name in names]
            together = torch.cat([tensors[name] for name in names])
            tensors |= dict(zip(names, together.split(rows), strict=True))
    return replace(llm, tensors=tensors)


def written(llm: BaseLLM, folder: Path) -> BaseLLM:
    folder.mkdir()
    save_language(llm, folder)
    return open_base_llm(str(folder), dtype=None)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen"])
def test_an_llm_survives_the_hubs_layout(
    write_gguf: WriteGGUF, tiny_config: LanguageConfig, tmp_path: Path, architecture: str
) -> None:
    config = replace(
        tiny_config, qkv_bias=architecture in ("qwen", "qwen2"), qk_norm=architecture == "qwen3",
        num_kv_heads=4 if architecture == "qwen" else 2, tied_embeddings=architecture != "qwen",
    )  # fmt: skip
    path, _ = write_gguf(architecture=architecture, config=config)
    llm = open_base_llm(str(path), cache=tmp_path / "cache")
    again = written(fused(llm) if architecture == "qwen" else llm, tmp_path / "out")
    assert (again.config, again.tokenizer_config, again.digest) == (llm.config, llm.tokenizer_config, llm.digest)
    assert again.tokenizer.read_bytes() == llm.tokenizer.read_bytes()
    assert again.tensors.keys() == llm.tensors.keys()
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, llm.tensors[name]), name


def test_a_large_llm_is_written_in_shards_as_it_is_kept(
    write_gguf: WriteGGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_gguf()
    llm = open_base_llm(str(path), cache=tmp_path / "cache", dtype=torch.bfloat16)
    monkeypatch.setattr(hub_export, "SHARD", 20_000)
    again = written(llm, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert {tensor.dtype for tensor in again.tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert again.digest == llm.digest
    (tmp_path / "out" / "plain").touch()
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


def test_a_file_that_cannot_be_finished_is_an_error_of_the_system(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    llm = open_base_llm(str(path), cache=tmp_path / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"."):
            written(llm, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("Qwen2", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
        (
            "Llama",
            {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_transformers_opens_what_is_written_with_equal_logits(
    write_hub_folder: WriteHub, tmp_path: Path, architecture: str, rope: dict[str, Any]
) -> None:
    import transformers

    folder, _ = write_hub_folder(architecture, max_position_embeddings=64, initializer_range=0.3, rope_parameters=rope)
    llm = open_base_llm(str(folder))
    again = written(llm, tmp_path / "out")
    assert again.config == llm.config
    ids = [[3, 1, 4, 1, 5, 9, 2, 6, 200, 250, 17, *range(30, 80)]]
    with torch.no_grad():
        models = [transformers.AutoModelForCausalLM.from_pretrained(one).eval() for one in (folder, tmp_path / "out")]
        wanted, theirs = (model(torch.tensor(ids)).logits for model in models)
        ours = build_transformer(ModelConfig(language=again.config, num_codes=16), again.tensors)
        found = ours.text_logits(ours(text_segment(ids), ours.new_cache()))
    assert torch.equal(theirs, wanted)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
