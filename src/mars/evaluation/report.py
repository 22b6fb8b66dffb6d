"""What an evaluation leaves behind: report.json, report.md, predictions.jsonl, pictures; each whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mars.checkpoint import write_json
from mars.errors import RequestError
from mars.files import whole_file

LABEL = 16
"""Pixels of height for the line of text above a picture."""
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A drawn picture, the true one, and a line of text."""

    label: str
    drawn: Image.Image
    true: Image.Image
    right: bool
    """Whether the true one was retrieved."""


def contact_sheet(pairs: Sequence[Pair], *, columns: int = COLUMNS) -> Image.Image:
    """Drawn pictures above their true ones, at least one pair; a green line between where retrieval succeeded."""
    width, height = pairs[0].true.size
    step = LABEL + 2 * height + 6
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (min(columns, len(pairs)) * (width + 4), rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for index, pair in enumerate(pairs):
        left, top = index % columns * (width + 4), index // columns * step
        pen.text((left + 2, top + 2), _shortened(pair.label, pen, width), fill="black")
        sheet.paste(pair.drawn.convert("RGB").resize((width, height)), (left, top + LABEL))
        line = (left, top + LABEL + height, left + width - 1, top + LABEL + height + 1)
        pen.rectangle(line, fill="green" if pair.right else "lightgrey")
        sheet.paste(pair.true.convert("RGB"), (left, top + LABEL + height + 2))
    return sheet


def _shortened(text: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    """The text as far as it fits; PIL's own font knows ASCII only."""
    text = text if text.isascii() else ""
    while text and pen.textlength(text) > width - 4:
        text = text[:-1]
    return text


def open_folder(out: Path) -> None:
    """Makes the folder of a report before anything is measured.

    Raises:
        RequestError: if it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"the report's folder {out} cannot be made: {error.strerror or error}") from None


def write_report(
    out: Path,
    report: dict[str, Any],
    *,
    predictions: str,
    pictures: dict[str, Image.Image],
) -> str:
    """Writes `report.json`, `report.md`, `predictions.jsonl` and `NAME.png` for each picture; returns the markdown.

    Args:
        predictions: a line of JSON for each picture.

    Raises:
        RequestError, CheckpointError: if a file cannot be written.
    """
    text = markdown(report)
    for name, content in (("report.md", text), ("predictions.jsonl", predictions)):
        _whole(out / name, content.encode())
    for name, picture in pictures.items():
        _whole(out / f"{name}.png", picture)
    write_json(out / "report.json", report)
    return text


def _whole(path: Path, content: bytes | Image.Image) -> None:
    with whole_file(path, error=RequestError) as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content.save(partial, format="PNG")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page, with a table for each bench that was run."""
    settings, model = report["settings"], report["model"]
    parts = {
        "retrieval": _retrieval,
        "captions": _captions,
        "diversity": _diversity,
        "memorisation": _memorisation,
        "clip": _clip,
        "distribution": _distribution,
        "composition": _composition,
        "image_tokenizer": _image_tokenizer,
    }
    lines = [f"# Evaluation of {model['name']}", "", "Intervals are 95 %, by bootstrap over prompts.", ""]
    for name, table in parts.items():
        if name in report:
            lines += [*table(report[name], settings), ""]
    lines += [
        f"Sampling {json.dumps(settings['sampling'])}, seed {settings['seed']}, candidates chosen by "
        f"{settings.get('scorer', 'likelihood')}; model {model['visual_digest'][:19]}; "
        f"{report['machine']['cores']} cores, {sum(report['seconds'].values()):.0f} s.",
        *[f"Note: {note}" for note in report["notes"]],
    ]
    return "\n".join(lines) + "\n"


def _each(benches: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The figures of each name and language."""
    for name, languages in benches.items():
        for language, figures in languages.items():
            yield name, language, figures


def _retrieval(sets: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    lines = [
        f"Top-1 and top-5 retrieval of the true picture among {settings['candidates']} of its own style, by features "
        f"of EfficientNet-Lite0. Floor: {settings['floor_pictures']} pictures drawn for the "
        "empty prompt. Ceiling: the image tokenizer's reconstructions of the true pictures. Share: of the way from "
        "floor to ceiling.",
        "",
        "| prompts | language | n | top-1 | floor | ceiling | share | top-5 | floor | ceiling | share |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, language, figures in _each(sets):
        cells = [cell for top in ("top1", "top5") for cell in _cells(figures[top])]
        lines.append(f"| {name} | {language} | {figures['prompts']} | {' | '.join(cells)} |")
    return lines


def _composition(categories: dict[str, Any], _: dict[str, Any]) -> list[str]:
    names = list(next(iter(next(iter(categories.values())).values()))["respects"])
    lines = [
        "Scenes in combinations that training never saw, judged by an analytic detector. Floor: pictures of other "
        "prompts of the category. Ceiling: the image tokenizer's reconstructions of the true pictures. Detector: how "
        "often it is right about those themselves.",
        "",
        f"| category | language | n | right | floor | ceiling | share | detector | {' | '.join(names)} |",
        f"|---|---|{'--:|' * (6 + len(names))}",
    ]
    for category, language, figures in _each(categories):
        cells = [*_cells(figures["right"]), f"{figures['detector']:.1%}"]
        cells += [f"{figures['respects'][name]:.0%}" for name in names]
        lines.append(f"| {category} | {language} | {figures['prompts']} | {' | '.join(cells)} |")
    return lines


def _captions(sets: dict[str, Any], _: dict[str, Any]) -> list[str]:
    lines = [
        "Captions of true pictures: right if the first words are the picture's name or one of its CLDR keywords. "
        "Of scenes in combinations that training never saw, if all that they say is so. "
        "Floor: captions of the other pictures. Exact: the name itself, or the words that training uses.",
        "",
        "| pictures | language | n | right | floor | exact |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, language, figures in _each(sets):
        right, floor = _cells(figures["right"])[:2]
        exact = "{:.1%} ({:.1%}..{:.1%})".format(figures["exact"], *figures["exact_interval"])
        lines.append(f"| {name} | {language} | {figures['pictures']} | {right} | {floor} | {exact} |")
    return lines


def _diversity(figures: dict[str, Any], _: dict[str, Any]) -> list[str]:
    low, high = figures["same_prompt_interval"]
    return [
        f"Diversity: pictures of one prompt with {figures['seeds']} seeds are {figures['same_prompt']:.3f} "
        f"({low:.3f}..{high:.3f}) apart, pictures of different prompts {figures['different_prompts']:.3f}: mean "
        f"distances of features of length 1, {figures['prompts']} prompts.",
    ]


def _memorisation(figures: dict[str, Any], _: dict[str, Any]) -> list[str]:
    names = {"drawn": "drawn", "held_out": "held out, reconstructed", "copied": "training pictures, reconstructed"}
    lines = [
        f"Distance to the nearest of {figures['training_pictures']:,} training pictures (root mean square of 32x32 "
        f"pixels); nearer than {figures['copy_below']:.3f} counts as a copy.",
        "",
        "| pictures | n | mean | least | copies |",
        "|---|--:|--:|--:|--:|",
    ]
    for key, name in names.items():
        one = figures[key]
        lines.append(f"| {name} | {one['pictures']} | {one['mean']:.3f} | {one['least']:.3f} | {one['copies']:.1%} |")
    return lines


def _clip(figures: dict[str, Any], _: dict[str, Any]) -> list[str]:
    cells = [
        "{:.3f} ({:.3f}..{:.3f})".format(figures[name], *figures[f"{name}_interval"])
        for name in ("clip_score", "r_precision")
    ]
    return [
        f"CLIPScore {cells[0]} and R-precision among {figures['choices']} prompts {cells[1]}, by {figures['network']}, "
        f"{figures['pictures']} pictures.",
    ]


def _distribution(figures: dict[str, Any], _: dict[str, Any]) -> list[str]:
    names = {"drawn": "drawn", "other_true": "other true pictures", "rebuilt": "the same, reconstructed (rFID)"}
    lines = [
        f"Distance to {figures['true_pictures']} training pictures by {figures['features']} features of "
        f"{figures['network']}. FID of so few pictures is too large; compare it within a column of equal n only.",
        "",
        "| pictures | n | FID | KID |",
        "|---|--:|--:|--:|",
    ]
    for key, name in names.items():
        one = figures[key]
        lines.append(
            f"| {name} | {one['pictures']} | {one['fid']:.3f} | {one['kid']:.4f} +- {one['kid_deviation']:.4f} |"
        )
    return lines


def _image_tokenizer(codec: dict[str, Any], _: dict[str, Any]) -> list[str]:
    values = [f"{codec['psnr']:.2f} dB", f"{codec['ssim']:.3f}", f"{codec['perceptual']:.3f}"]
    values += [f"{codec['usage']:.1%}", f"{codec['perplexity']:,.0f}"]
    return [
        "| held-out pictures | PSNR | SSIM | perceptual distance | codes used | perplexity |",
        "|--:|--:|--:|--:|--:|--:|",
        f"| {codec['held_out_pictures']} | {' | '.join(values)} |",
        *_nearest(codec),
    ]


def _nearest(codec: dict[str, Any]) -> list[str]:
    """The row of nearest codes, where others are chosen."""
    if "nearest_psnr" not in codec:
        return []
    quality = f"{codec['nearest_psnr']:.2f} dB | {codec['nearest_ssim']:.3f} | -"
    return [f"| nearest codes | {quality} | {codec['nearest_usage']:.1%} | {codec['nearest_perplexity']:,.0f} |"]


def _cells(figures: dict[str, Any]) -> list[str]:
    low, high = figures["model_interval"]
    share = "-" if figures["share_of_way"] is None else f"{figures['share_of_way']:.0%}"
    if figures["share_of_way_interval"] is not None:
        share += " ({:.0%}..{:.0%})".format(*figures["share_of_way_interval"])
    model = f"{figures['model']:.1%} ({low:.1%}..{high:.1%})"
    return [model, f"{figures['floor']:.1%}", f"{figures['ceiling']:.1%}", share]
