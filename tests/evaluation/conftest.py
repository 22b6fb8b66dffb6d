"""A tiny model, and a tiny picture shard with captions in two languages."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mars.checkpoint import MarsModel, ModelInfo
from mars.data.curation.clip import Clip
from mars.data.shards import Caption, Picture, Record, write_pictures
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig
from mars.model.language_tensors import language_shapes
from mars.model.starting import start_visual
from mars.model.transformer import build_transformer
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


class _Unread(Clip):
    """With weights as PyTorch starts them."""

    def _load(self, folder: Path) -> list[Path]:
        torch.manual_seed(0)
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        return []


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP that has learned nothing."""
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{number}" for number in range(40))]
    layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    config = {
        "text_config": {**layers, "vocab_size": len(words), "max_position_embeddings": 8},
        "vision_config": {**layers, "image_size": 32, "patch_size": 8},
        "projection_dim": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $0 <|endoftext|>", special_tokens=[(word, words.index(word)) for word in words[:2]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_Unread(folder).state_dict(), folder / "model.safetensors")
    return folder
