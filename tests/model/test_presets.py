import tomllib
from pathlib import Path

import pytest

from mars.checkpoint import read_json
from mars.config import from_dict
from mars.errors import RequestError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.model.config import SemVIEConfig
from mars.model.costs import count_parameters, meta_transformer
from mars.model.presets import PRESETS, find_preset
from mars.sequence.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]

# Parameters that the LLMs' publishers name, in billions, rounded.
PUBLISHED = {
    "qwen-7b": 7.72,
    "qwen1.5-1.8b": 1.84,
    "qwen1.5-7b": 7.72,
    "qwen1.5-14b": 14.2,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "llama-2-7b": 6.74,
    "llama-3-8b": 8.03,
    "smollm2-135m": 0.135,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_language_expert_has_as_many_parameters_as_its_publisher_says(name: str) -> None:
    counts = count_parameters(meta_transformer(PRESETS[name].model))
    assert counts["language layers"] + counts["language tables"] == pytest.approx(PUBLISHED[name] * 1e9, rel=0.01)


def test_qwen_7b_is_the_papers_model() -> None:
    preset = find_preset("qwen-7b")
    transformer = meta_transformer(preset.model)
    counts = count_parameters(transformer)
    # Embedding and head; q, k, v, o and their three biases; gate, up, down; two norms; and the last norm.
    layer = 4 * 4096**2 + 3 * 4096 + 3 * 4096 * 11_008 + 2 * 4096
    assert counts["language layers"] + counts["language tables"] == 2 * 151_936 * 4096 + 32 * layer + 4096
    assert counts["language layers"] + counts["language tables"] == 7_721_324_544
    assert transformer.vocabulary.size == 160_136
    assert preset.model.semvie == SemVIEConfig()
    assert (preset.image_tokenizer.factor, preset.image_tokenizer.num_codes, preset.grid) == (16, 8192, (16, 16))


def test_the_preset_of_smollm2_is_mars_mini() -> None:
    preset = find_preset("smollm2-135m")
    recipe = tomllib.loads((ROOT / "configs" / "mini-pretrain.toml").read_text(encoding="utf-8"))
    assert preset.model.semvie == from_dict(SemVIEConfig, recipe["model"]["semvie"])
    shipped = read_json(ROOT / "src" / "mars" / "assets" / "mars-mini" / "image_tokenizer.json")
    assert preset.image_tokenizer == from_dict(ImageTokenizerConfig, shipped)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_fits_together(name: str) -> None:
    preset = find_preset(name)
    assert preset.name == name
    assert preset.model.num_codes == preset.image_tokenizer.num_codes
    text = preset.model.language.vocab_size
    assert Vocabulary(text_size=text, num_codes=preset.model.num_codes).size % 8 == 0
    rows, columns = preset.grid
    assert rows * columns < preset.model.language.max_positions


@pytest.mark.parametrize(
    ("name", "words"),
    [("qwen-7", "did you mean qwen-7b"), ("Qwen3-8B", "did you mean qwen3-8b"), ("gpt", "known are qwen-7b, ")],
)
def test_an_unknown_preset_is_one_line(name: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_preset(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
