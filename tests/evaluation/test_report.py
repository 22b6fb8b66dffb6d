import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mars.errors import RequestError
from mars.evaluation.report import Pair, contact_sheet, markdown, open_folder, write_report

FIGURES = {
    "model": 0.5,
    "floor": 0.01,
    "ceiling": 0.9,
    "share_of_way": 0.55,
    "model_interval": [0.43, 0.57],
    "share_of_way_interval": [0.47, 0.63],
}
REPORT: dict[str, Any] = {
    "model": {"name": "tiny", "visual_digest": "sha256:0123456789abcdef"},
    "settings": {"candidates": 100, "floor_pictures": 64, "sampling": {"guidance": 3.0}, "seed": 0},
    "retrieval": {"trained names": {"en": {"prompts": 200, "top1": FIGURES, "top5": {**FIGURES, "model": 0.7}}}},
    "image_tokenizer": {
        "psnr": 22.5, "ssim": 0.8, "perceptual": 0.7, "usage": 0.793, "perplexity": 3657.0, "held_out_pictures": 622,
    },
    "machine": {"cores": 2},
    "seconds": {"reading": 1.0, "drawing": 2.0},
    "notes": ["held-out concepts: few"],
}  # fmt: skip


def pair(colour: str, *, right: bool = True, label: str = "1: a thing") -> Pair:
    return Pair(
        label=label, drawn=Image.new("RGB", (64, 64), colour), true=Image.new("RGB", (64, 64), "blue"), right=right
    )


def test_the_page_holds_every_figure() -> None:
    page = markdown(REPORT)
    row = next(line for line in page.splitlines() if line.startswith("| trained names | en | 200 |"))
    assert "50.0% (43.0%..57.0%) | 1.0% | 90.0% | 55% (47%..63%) | 70.0%" in row
    assert "| 622 | 22.50 dB | 0.800 | 0.700 | 79.3% | 3,657 |" in page
    assert "Note: held-out concepts: few" in page
    nearest = {"nearest_psnr": 22.9, "nearest_ssim": 0.83, "nearest_usage": 0.89, "nearest_perplexity": 4681.0}
    page = markdown({**REPORT, "image_tokenizer": {**REPORT["image_tokenizer"], **nearest}})
    assert "| nearest codes | 22.90 dB | 0.830 | - | 89.0% | 4,681 |" in page


def test_benches_that_were_not_run_are_not_on_the_page_and_others_are() -> None:
    without = {name: value for name, value in REPORT.items() if name not in ("retrieval", "image_tokenizer")}
    assert "|" not in markdown(without)
    category = {"prompts": 48, "right": FIGURES, "detector": 1.0, "respects": {"number": 0.75, "places": 0.25}}
    near = {"pictures": 64, "mean": 0.125, "least": 0.0625, "copies": 0.5}
    page = markdown(
        {
            **without,
            "composition": {"colour": {"en": category, "zh": category}},
            "diversity": {
                "prompts": 24, "seeds": 4, "same_prompt": 0.5, "same_prompt_interval": [0.4, 0.6],
                "different_prompts": 1.1,
            },
            "memorisation": {
                "training_pictures": 9000, "copy_below": 0.05, "drawn": near, "held_out": near, "copied": near,
            },
        }
    )  # fmt: skip
    assert "| colour | zh | 48 | 50.0% (43.0%..57.0%) | 1.0% | 90.0% | 55% (47%..63%) | 100.0% | 75% | 25% |" in page
    assert "0.500 (0.400..0.600) apart, pictures of different prompts 1.100" in page
    assert "| drawn | 64 | 0.125 | 0.062 | 50.0% |" in page


def test_a_share_that_does_not_exist_is_a_dash() -> None:
    none = {**FIGURES, "share_of_way": None, "share_of_way_interval": None}
    page = markdown({**REPORT, "retrieval": {"x": {"zh": {"prompts": 1, "top1": none, "top5": none}}}})
    assert "| 90.0% | - |" in page


def test_the_sheet_shows_the_drawn_picture_above_the_true_one_and_a_line_between() -> None:
    sheet = contact_sheet([pair("red"), pair("red", right=False)], columns=2)
    assert sheet.getpixel((32, 16 + 32)) == (255, 0, 0)
    assert sheet.getpixel((32, 16 + 64)) == (0, 128, 0)
    assert sheet.getpixel((68 + 32, 16 + 64)) != (0, 128, 0)
    assert sheet.getpixel((32, 16 + 64 + 34)) == (0, 0, 255)


def test_the_sheet_takes_labels_that_are_long_or_chinese() -> None:
    sheet = contact_sheet([pair("red", label="1: " + "long " * 50), pair("red", label="1: 披萨")] * 5, columns=4)
    assert sheet.size == (4 * 68, 3 * (16 + 128 + 6))


def test_everything_is_written_and_nothing_is_left_over(tmp_path: Path) -> None:
    page = write_report(
        tmp_path, REPORT, predictions='{"prompt": "披萨", "rank": 1}\n', pictures={"drawn-en": Image.new("RGB", (4, 4))}
    )
    names = {"report.json", "report.md", "predictions.jsonl", "drawn-en.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "report.md").read_text("utf-8") == page
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == REPORT
    assert json.loads((tmp_path / "predictions.jsonl").read_text("utf-8")) == {"prompt": "披萨", "rank": 1}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="cannot be made"):
        open_folder(tmp_path / "file")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    (tmp_path / "report.md" / "in the way").touch()
    with pytest.raises(RequestError, match="cannot write"):
        write_report(tmp_path, REPORT, predictions="", pictures={})
    assert not list(tmp_path.glob("*.partial"))
