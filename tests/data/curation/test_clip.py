"""Our CLIP against that of `transformers`, at random small size; both activations, an odd number of captions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mars.data.curation.clip import Clip, ClipAesthetic, ClipScore
from mars.data.curation.config import ScorerConfig
from mars.data.curation.scorers import open_scorer
from mars.data.shards import Caption
from mars.errors import ModelError
from tests.data.conftest import art

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "red", "house", "hill", "on", "the", "blue"]
SIDE, CONTEXT, WIDTH = 32, 7, 24


def write_clip(folder: Path, *, activation: str) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text: dict[str, int | str] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    text |= {"vocab_size": len(WORDS), "max_position_embeddings": CONTEXT, "hidden_act": activation}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision: dict[str, int | str] = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
    }
    vision |= {"image_size": SIDE, "patch_size": 8, "hidden_act": activation}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    for weight in model.parameters():  # larger than at the start of training, so that everything shows
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    seen = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $0 <|endoftext|>", special_tokens=[(word, WORDS.index(word)) for word in WORDS[:2]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), activation=request.param)


IMAGES = [art(1), art(2, size=(90, 40)), art(3, size=(20, 50))]
TEXTS = ["a red house", "hill", "the blue house on the hill on a hill"]


def test_vectors_are_those_of_transformers(clip_folder: Path) -> None:
    from transformers import CLIPModel

    ours, theirs = Clip(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    pixels = torch.stack([ours._pixels(image) for image in IMAGES])
    ids = torch.tensor([[0, 2, 3, 4, 1, 1, 1], [0, 5, 1, 1, 1, 1, 1], [0, 7, 8, 4, 6, 7, 1]])  # the last one is cut
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=None, pixel_values=pixels)
    torch.testing.assert_close(ours.images(IMAGES), found.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.texts(TEXTS), found.text_embeds, atol=1e-5, rtol=1e-5)


def test_a_picture_is_what_it_is_alone_and_so_is_a_text(clip_folder: Path) -> None:
    model = Clip(clip_folder)
    torch.testing.assert_close(model.images(IMAGES)[1:2], model.images(IMAGES[1:2]))
    torch.testing.assert_close(model.texts(TEXTS)[1:2], model.texts(TEXTS[1:2]))


def test_the_middle_square_is_looked_at(clip_folder: Path) -> None:
    model = Clip(clip_folder)
    pixels = np.zeros((SIDE, 3 * SIDE, 3), dtype=np.uint8)
    pixels[:, SIDE : 2 * SIDE] = 255
    white = (1 - model.mean) / model.deviation
    torch.testing.assert_close(model._pixels(Image.fromarray(pixels))[:, 4:-4, 4:-4], white.expand(3, 24, 24))


def test_the_score_is_the_cosine_of_the_best_caption_in_the_language(clip_folder: Path) -> None:
    def captions(*texts: str, language: str = "en") -> tuple[Caption, ...]:
        return tuple(Caption(text=text, language=language, kind="original") for text in texts)

    scorer = open_scorer(ScorerConfig(scorer="mars.data.curation.clip:ClipScore", options={"folder": str(clip_folder)}))
    found = scorer.score(IMAGES, [captions(*TEXTS), captions("一座房子", language="zh"), captions(TEXTS[1])])
    model = Clip(clip_folder)
    cosines = model.images(IMAGES) @ model.texts(TEXTS).T
    assert found[0] == pytest.approx(float(cosines[0].max()), abs=1e-4)
    assert found[1] is None
    assert found[2] == pytest.approx(float(cosines[2, 1]), abs=1e-4)
    assert scorer.score(IMAGES[:1], [()]) == [None]


def test_the_aesthetic_score_is_a_linear_head(clip_folder: Path, tmp_path: Path) -> None:
    weight, bias = torch.randn(1, WIDTH), torch.tensor([5.0])
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    found = ClipAesthetic(folder=str(clip_folder), head=str(tmp_path / "head.safetensors")).score(IMAGES, [()] * 3)
    expected = (Clip(clip_folder).images(IMAGES) @ weight.T + bias).squeeze(1).tolist()
    assert found == pytest.approx(expected, abs=1e-4)
    save_file({"weight": weight[:, 1:].contiguous(), "bias": bias}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=f"weight \\(1, {WIDTH}\\)"):
        ClipAesthetic(folder=str(clip_folder), head=str(tmp_path / "other.safetensors"))


def test_the_digest_is_that_of_all_that_decides_the_score(clip_folder: Path, tmp_path: Path) -> None:
    folder, head = tmp_path / "clip", tmp_path / "head.safetensors"
    shutil.copytree(clip_folder, folder)
    save_file({"weight": torch.zeros(1, WIDTH), "bias": torch.zeros(1)}, head)
    digests = [ClipScore(folder=str(clip_folder)).digest, ClipAesthetic(folder=str(folder), head=str(head)).digest]
    assert ClipScore(folder=str(folder)).digest == digests[0], "the place does not matter"
    save_file({"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}, head)
    digests.append(ClipAesthetic(folder=str(folder), head=str(head)).digest)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        digests.append(ClipScore(folder=str(folder)).digest)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "visual_projection.weight": 2 * weights["visual_projection.weight"]}, folder / "model.safetensors"
    )
    digests.append(ClipScore(folder=str(folder)).digest)
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty object"])
def test_a_folder_that_is_no_clip_is_refused(clip_folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    if damage == "missing":
        (folder / file).unlink()
    elif damage == "cut":
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
    else:
        (folder / file).write_text("{}")
    with pytest.raises(ModelError) as caught:
        ClipScore(folder=str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"visual_projection\.weight"):
        Clip(folder)
