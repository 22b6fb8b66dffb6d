"""A tiny model, and a tiny picture shard with captions in two languages."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mars.checkpoint import MarsModel, ModelInfo
from mars.data.shards import Caption, Picture, Record, write_pictures
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig
from mars.model.language_tensors import language_shapes
from mars.model.transformer import build_transformer, start_visual
from mars.pipeline import MarsPipeline
from mars.sequence.text import TextTokenizer

SIDE = 32
COLOURS = ("red", "green", "blue", "orange")
SPLITS = ("train", "train", "train", "picture", "concept")


@pytest.fixture
def pipe(tmp_path: Path) -> MarsPipeline:
    """An untrained model that draws 32x32 pixels of 16 codes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    language = LanguageConfig(
        vocab_size=len(tokens), width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_width=8, ffn=32,
        rope_theta=10000.0, norm_eps=1e-5, max_positions=256, tied_embeddings=True,
    )  # fmt: skip
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in language_shapes(language).items()}
    config = ModelConfig(language=language, semvie=SemVIEConfig(), num_codes=16)
    transformer = build_transformer(config, tensors)
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    codec = ImageTokenizerConfig(
        num_codes=16, code_width=4, channels=(8, 8), patch=8, blocks_per_level=1, norm_groups=4
    )
    info = ModelInfo(name="tiny", language="none", language_digest="sha256:0", grids=((2, 2),))
    return MarsPipeline(
        MarsModel(
            info=info,
            transformer=transformer.eval(),
            image_tokenizer=ImageTokenizer(codec).eval(),
            text_tokenizer=TextTokenizer(tmp_path / "tokenizer.json", config={"eos_token_id": 0}),
            visual_digest="sha256:1",
        )
    )


def picture(number: int, *, style: str, split: str) -> Picture:
    """A square whose colour, place and size depend on its number."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    left, width = number % 5 * 3, 6 + number // 5
    ImageDraw.Draw(image).rectangle((left, left, left + width, left + width), fill=COLOURS[number % 4])
    png = io.BytesIO()
    image.save(png, "PNG")
    captions = []
    for language, name, words in (("en", f"square {number}", style), ("zh", f"方块{number}", "风格")):
        captions.append(Caption(text=name, language=language, kind="name"))
        captions.append(Caption(text=f"{name}, {words}", language=language, kind="style"))
        captions.append(Caption(text=f"box {number} {language}", language=language, kind="paraphrase"))
    record = Record(
        key=f"{style}-{number}", concept=str(number), style=style, split=split, source="test", licence="CC0-1.0",
        captions=tuple(captions),
    )  # fmt: skip
    return Picture(record=record, content=png.getvalue())


@pytest.fixture
def pictures() -> dict[str, Picture]:
    """Twenty-five pictures in each of two styles, by key."""
    made = [picture(number, style=style, split=SPLITS[number % 5]) for style in ("a", "b") for number in range(25)]
    return {one.record.key: one for one in made}


@pytest.fixture
def shard(tmp_path: Path, pictures: dict[str, Picture]) -> Path:
    """The same pictures as a file."""
    write_pictures(tmp_path / "pictures.tar", pictures.values())
    return tmp_path / "pictures.tar"
