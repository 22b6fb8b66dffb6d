"""Settings for every test (few threads, no network, the same random numbers each time), and a tiny real model."""

import os

# Before torch and huggingface_hub are imported, which read these once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import ctypes
import gc
import io
import json
import random
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from mars.model.transformer import MarsTransformer
    from mars.pipeline import MarsPipeline

torch.set_num_threads(min(2, os.cpu_count() or 1))

settings.register_profile("mars", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mars")


@pytest.fixture(autouse=True)
def seed_every_generator() -> None:
    """Start each test from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator of libraries that use the old interface
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GRID = (2, 3)
"""Rows and columns of the tiny model's pictures: 48 pixels wide, 32 high."""


def _random(tensors: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Weights of these shapes, large enough that every part of a layer shows in what comes out."""
    generator, filled = torch.Generator().manual_seed(seed), {}
    for name, tensor in sorted(tensors.items()):
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            filled[name] = 1 + 0.1 * values
        else:
            filled[name] = values * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3 * values
    return filled


def _write_llm(folder: Path, *, ffn: int) -> Path:
    from tokenizers import pre_tokenizers

    from mars.model.gguf_tokenizer import GGUFTokens, write_tokenizer
    from mars.model.hub_config import hub_config
    from mars.model.language_tensors import hub_name, language_shapes

    tokens = [*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    kinds = [3] * len(WORDS) + [1] * (len(tokens) - len(WORDS))
    write_tokenizer(
        GGUFTokens(model="gpt2", pre="smollm", tokens=tokens, kinds=kinds, merges=["h e"]),
        path=folder / "tokenizer.json",
        source="test",
    )
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens), "hidden_size": 32,
        "intermediate_size": ffn, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 192, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), "utf-8")
    shapes = language_shapes(hub_config(fields, source="test"))
    weights = _random({hub_name(name): torch.empty(shape) for name, shape in shapes.items()}, seed=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers in the hub's layout, with a tokenizer of bytes and a chat template."""
    return _write_llm(tmp_path_factory.mktemp("llm"), ffn=48)


@pytest.fixture(scope="session")
def even_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with widths that are multiples of 32, as weights of 8 and 4 bits need them."""
    return _write_llm(tmp_path_factory.mktemp("even"), ffn=64)


@pytest.fixture(scope="session")
def build_tiny(tiny_llm: Path) -> "Callable[..., MarsTransformer]":
    """Builds a transformer on the tiny LLM with random visual weights; arguments are those of SemVIEConfig."""
    from mars.model.base_llm import open_base_llm
    from mars.model.config import ModelConfig, SemVIEConfig
    from mars.model.transformer import build_transformer

    def build(**semvie: Any) -> "MarsTransformer":
        llm = open_base_llm(str(tiny_llm))
        config = ModelConfig(language=llm.config, semvie=SemVIEConfig(**semvie), num_codes=64)
        transformer = build_transformer(config, llm.tensors).eval()
        visual = transformer.visual_tensors()
        for name, values in _random(visual, seed=1).items():
            visual[name].data.copy_(values * 4 if name == "visual_head.weight" else values)
        return transformer

    return build


POCKET: dict[str, Any] = {
    "share_norms": False, "visual_width": 24, "visual_ffn": 40, "visual_layers": (0, 2), "init": "random",
    "grid_embedding": True, "max_grid": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def pocket() -> dict[str, Any]:
    """The options of a narrow visual expert in some of the layers, as the shipped model has."""
    return dict(POCKET)


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, build_tiny: "Callable[..., MarsTransformer]"
) -> Path:
    """The folder of a whole random model; copy it before changing it."""
    from mars.checkpoint import ModelInfo, save_model
    from mars.image_tokenizer.config import ImageTokenizerConfig
    from mars.image_tokenizer.model import ImageTokenizer
    from mars.model.base_llm import open_base_llm

    torch.manual_seed(0)
    config = ImageTokenizerConfig(num_codes=64, code_width=8, channels=(32,), patch=16, blocks_per_level=1)
    image_tokenizer = ImageTokenizer(config)
    image_tokenizer.quantizer.embedding.weight.data.normal_()
    image_tokenizer.decoder.conv_out.weight.data.mul_(2)
    info = ModelInfo(
        name="tiny", language=str(tiny_llm), language_digest=open_base_llm(str(tiny_llm)).digest, grids=(GRID,)
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, info=info, transformer=build_tiny(**POCKET), image_tokenizer=image_tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_upscaler(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, build_tiny: "Callable[..., MarsTransformer]"
) -> Path:
    """The folder of a random model that also draws the tiny model's grid again, twice as large, with K = 4."""
    from dataclasses import replace

    from mars.checkpoint import load_image_tokenizer, read_info, save_model
    from mars.model.config import UpscaleConfig

    info = replace(
        read_info(tiny_model)[0],
        name="tiny-upscaler",
        upscale=UpscaleConfig(scale=2, codes_per_step=4),
    )
    folder = tmp_path_factory.mktemp("upscaler")
    transformer = build_tiny(**{**POCKET, "max_grid": 8}, low_input=True)
    save_model(folder, info=info, transformer=transformer, image_tokenizer=load_image_tokenizer(tiny_model)[0])
    return folder


@pytest.fixture(scope="session")
def even_model(tmp_path_factory: pytest.TempPathFactory, even_llm: Path, tiny_model: Path) -> Path:
    """The folder of a new model on `even_llm` with the tiny model's image tokenizer; pictures have 32x32 pixels."""
    from mars.convert import init_model

    folder = tmp_path_factory.mktemp("models") / "even"
    init_model(folder, language=str(even_llm), image_tokenizer=str(tiny_model), size=32)
    return folder


@pytest.fixture(scope="session")
def pipe(tiny_model: Path) -> "MarsPipeline":
    """The tiny model, opened."""
    from mars.pipeline import MarsPipeline

    return MarsPipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture shard: 24 pictures to train on, 4 held out as concepts and 4 as pictures, all of random blocks."""
    from mars.data.shards import Caption, Picture, Record, write_pictures

    random_numbers = np.random.default_rng(0)

    def picture(index: int) -> Picture:
        split = "train" if index < 24 else "concept" if index < 28 else "picture"
        blocks = random_numbers.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        png = io.BytesIO()
        Image.fromarray(blocks).resize((48, 32), Image.Resampling.NEAREST).save(png, "PNG")
        texts = {"name": f"{index}", "style": f"{index}, in style", "tags": f"t{index}", "paraphrase": f"p{index}"}
        captions = tuple(
            Caption(text=("图 " if language == "zh" else "") + text, language=language, kind=kind)
            for language in ("en", "zh")
            for kind, text in texts.items()
        )
        record = Record(
            key=f"k{index}", concept=f"c{index}", style="s", split=split, source="t", licence="CC0", captions=captions
        )
        return Picture(record=record, content=png.getvalue())

    path = tmp_path_factory.mktemp("pictures") / "tiny.tar"
    write_pictures(path, map(picture, range(32)))
    return path


@pytest.fixture(scope="session")
def tiny_codes(tiny_pictures: Path, tiny_model: Path) -> Path:
    """The code shard of `tiny_pictures` by the tiny model's own image tokenizer."""
    from mars.checkpoint import codes_digest, load_image_tokenizer
    from mars.data.encode import encode_pictures

    tokenizer, _ = load_image_tokenizer(tiny_model)
    out = tiny_pictures.with_suffix(".parquet")
    encode_pictures(tiny_pictures, tokenizer=tokenizer, digest=codes_digest(tokenizer), out=out)
    return out


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Makes the operating system refuse to write beyond `size` bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def toml(table: dict[str, Any], section: str = "") -> str:
    """A table as a TOML file; tables inside it stand at its end."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    tables = [(f"{section}{key}", value) for key, value in table.items() if isinstance(value, dict)]
    return "\n".join([*lines, *(f"[{name}]\n{toml(value, f'{name}.')}" for name, value in tables)])


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], int]:
    """Measures by how many bytes the most memory that the process holds lies above what it held before some work."""

    def held(name: str) -> int:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def measure(work: Callable[[], object]) -> int:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would be used again, and not count
        try:
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # the high-water mark starts again from here
            before = held("VmRSS")
        except OSError:
            pytest.skip("only Linux tells how much memory was held")
        work()
        return held("VmHWM") - before

    return measure


@pytest.fixture
def stage(tmp_path: Path, tiny_llm: Path, tiny_model: Path, tiny_codes: Path) -> Callable[..., dict[str, Any]]:
    """The table of a stage that trains the tiny model for ten steps; arguments replace top-level values."""

    def table(**changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny", "out": str(tmp_path / "run"), "steps": 10, "batch_size": 6, "guidance_dropout": 0.2,
            "tasks": {"text_to_image": 0.7, "captioning": 0.3}, "precision": "fp32", "save_every": 1000,
            "sample_every": 1000,
            "model": {"language": str(tiny_llm), "image_tokenizer": str(tiny_model), "semvie": dict(POCKET)},
            "data": {"shards": [str(tiny_codes)]},
            "optimizer": {"learning_rate": 3e-3, "warmup": 2},
        } | changes  # fmt: skip

    return table
