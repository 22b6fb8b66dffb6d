"""One evaluation from its configuration to its report, and the same once more to see whether it still holds."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

import mars
from mars.config import from_dict, to_dict
from mars.data.curation.clip import Clip
from mars.data.scenes import draw_scene
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError, ModelError
from mars.evaluation.agreement import agreement
from mars.evaluation.captions import measure_captions, measure_scene_captions
from mars.evaluation.composition import CATEGORIES, Truth, choose_tasks, score
from mars.evaluation.config import CompositionBench, EmojiBench, EvaluationConfig
from mars.evaluation.drawing import BATCH, Artist
from mars.evaluation.features import PACKAGE, EfficientNetLite0
from mars.evaluation.plots import plot
from mars.evaluation.questions import CANDIDATES, LANGUAGES, POOL
from mars.evaluation.report import Pair, contact_sheet, open_folder, write_report
from mars.evaluation.retrieval import FLOOR_PICTURES, SHEET, Gallery, Retrieval, ask
from mars.image_tokenizer.losses import PerceptualDistance
from mars.image_tokenizer.model import ImageTokenizer
from mars.pipeline import MarsPipeline
from mars.pipeline.scoring import find_scorer
from mars.training.tokenizer_trainer import evaluate_tokenizer, reconstruction_grid

UNCHECKED = ("seconds", "machine", "versions", "config", "predictions_digest")
"""Parts of a report that another run may have otherwise (the digest is told apart from figures)."""


@dataclass
class _Run:
    """What an evaluation has gathered so far."""

    config: EvaluationConfig
    artist: Artist
    say: Callable[[str], None]
    report: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds what the block took, in seconds, and tells."""
        started = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - started, 1)
        self.say(f"{part}: {self.seconds[part]:.1f} s")


def evaluate(
    pipe: MarsPipeline, config: EvaluationConfig, *, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measures a model and writes `report.json`, `report.md`, `predictions.jsonl` and pictures into `config.out`.

    Args:
        pipe: the model that `config` names; the names themselves are only noted.
        say: called with a line for each part, and with the report as markdown.

    Returns:
        What `report.json` holds. Figures and pictures are the same for the same configuration.

    Raises:
        RequestError: if `config.out` cannot be written.
        DataError: if the shard is missing, is damaged, or holds no such prompts.
        ModelError: if the networks that pictures are measured with are not installed.
    """
    scorer = find_scorer(pipe, config.scorer)
    open_folder(config.out)
    artist = Artist(pipe=pipe, sampling=config.sampling, seed=config.seed, scorer=scorer)
    run = _Run(config=config, artist=artist, say=say)
    run.report = _circumstances(pipe, config)
    if config.emoji is not None:
        _measure_emoji(run, config.emoji)
    if config.composition is not None:
        _measure_composition(run, config.composition)
    if find_spec("matplotlib") is None:
        say("no plots.png: matplotlib is not installed; run: pip install 'mars-t2i[eval]'")
    elif (plots := plot(run.report)) is not None:
        run.pictures["plots"] = plots
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in run.predictions)
    digest = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    report = {**run.report, "predictions_digest": digest, "notes": run.notes, "seconds": run.seconds}
    say(write_report(config.out, report, predictions=lines, pictures=run.pictures))
    return report


def _measure_emoji(run: _Run, bench: EmojiBench) -> None:
    network = EfficientNetLite0()
    with run.measure("reading"):
        shard = {picture.record.key: picture for picture in read_pictures(bench.pictures)}
        asked = ask(shard, bench, seed=run.config.seed)
    run.notes += asked.notes
    gallery, found = Gallery(artist=run.artist, network=network, shard=shard), Retrieval()
    with run.measure("true pictures, floor and ceiling"):
        features = gallery.shared_features(one for group in asked.questions.values() for one in group)
    for name, questions in asked.questions.items():
        with run.measure(name):
            gallery.measure(name, questions, features=features, found=found)
    run.report["retrieval"] = found.figures
    run.predictions += found.predictions
    run.pictures |= found.sheets
    first = next(name for name, questions in asked.questions.items() if questions)
    if bench.captions:
        with run.measure("captions"):
            run.report["captions"], written = measure_captions(
                run.artist.pipe, shard, count=bench.captions, seed=run.config.seed
            )
            run.predictions += written
    if bench.diverse_prompts:
        with run.measure("diversity"):
            run.report["diversity"] = gallery.diversity(
                asked.questions[first], count=bench.diverse_prompts, seeds=bench.seeds
            )
    if bench.memorisation:
        with run.measure("memorisation"):
            run.report["memorisation"] = gallery.memorisation(found.drawings[first])
    if bench.clip is not None:
        with run.measure("CLIP"):
            english = found.drawings[first][: len(asked.questions[first])]
            agreed = agreement(
                Clip(bench.clip),
                [one.image for one in english],
                [one.prompt for one in english],
                seed=run.config.seed,
            )
            run.report["clip"] = {"network": bench.clip.name, **agreed}
    if bench.distribution is not None:
        with run.measure("FID and KID"):
            drawn = [one.image for one in found.drawings[first]]
            run.report["distribution"] = gallery.distribution(drawn, network=bench.distribution)
    with run.measure("image tokenizer"):
        held_out = [picture for picture in shard.values() if picture.record.split != "train"]
        run.report["image_tokenizer"], run.pictures["reconstructions"] = tokenizer_benchmark(
            run.artist.pipe.model.image_tokenizer, held_out=held_out
        )


def _measure_composition(run: _Run, bench: CompositionBench) -> None:
    width, height = run.artist.pipe.sizes[0]
    if width != height:
        raise ModelError(f"the compositional bench needs a model that draws squares, got {width}x{height}")
    figures: dict[str, Any] = {}
    pairs: dict[str, list[Pair]] = {language: [] for language in LANGUAGES}
    chosen = choose_tasks(count=bench.prompts, seed=run.config.seed, size=width)
    for category, tasks in chosen.items():
        if len(tasks) < bench.prompts:
            asked = f"there are {len(tasks)} prompts of the {bench.prompts} asked for"
            run.notes.append(f"composition, {category}: {asked}")
        with run.measure(f"composition, {category}"):
            truth = Truth.of(tasks, rebuild=run.artist.rebuild)
            for language in LANGUAGES:
                drawings = run.artist.draw([task.prompt(language) for task in tasks])
                scored = score(tasks, [one.image for one in drawings], truth=truth, seed=run.config.seed)
                found, rights = scored.pop("found"), scored.pop("rights")
                figures.setdefault(category, {})[language] = scored
                about = {"bench": "composition", "category": category, "language": language}
                for task, drawing, things, right in zip(tasks, drawings, found, rights, strict=True):
                    run.predictions.append({**about, **drawing.line(), "right": right, "found": things})
                    if len(pairs[language]) < SHEET and task in tasks[: SHEET // len(CATEGORIES)]:
                        true = draw_scene(task.scene)
                        label = f"{category}: {task.prompt('en')}"
                        pairs[language].append(Pair(label=label, drawn=drawing.image, true=true, right=right))
    run.report["composition"] = figures
    if bench.captions:
        with run.measure("captions of scenes"):
            described = [task for tasks in chosen.values() for task in tasks[: bench.captions]]
            found, written = measure_scene_captions(run.artist.pipe, described, seed=run.config.seed)
            run.report["captions"] = run.report.get("captions", {}) | found
            run.predictions += written
    run.pictures |= {f"composition-{language}": contact_sheet(shown) for language, shown in pairs.items()}


def tokenizer_benchmark(
    image_tokenizer: ImageTokenizer, *, held_out: Sequence[Picture]
) -> tuple[dict[str, float], Image.Image]:
    """PSNR, SSIM, perceptual distance, codebook usage and perplexity over pictures of one size, and a grid of them.

    Where codes of less entropy are chosen, the figures of nearest codes stand beside them (`nearest_...`).

    Raises:
        DataError: if there are none.
        ModelError: if the features of the perceptual distance are not installed.
    """
    if not held_out:
        raise DataError("the image tokenizer must be measured on held-out pictures, got none; take a shard with some")
    images = torch.stack([torch.from_numpy(one.pixels()) for one in held_out]).permute(0, 3, 1, 2)
    figures = evaluate_tokenizer(image_tokenizer, images, perceptual=PerceptualDistance())
    bias_V = image_tokenizer.quantizer.bias.clone()
    if bool(bias_V.any()):
        image_tokenizer.quantizer.bias.zero_()
        nearest = evaluate_tokenizer(image_tokenizer, images)
        image_tokenizer.quantizer.bias.copy_(bias_V)
        figures |= {f"nearest_{name}": value for name, value in nearest.items()}
    columns = min(12, -(-len(images) // 2))
    shown = torch.linspace(0, len(images) - 1, 2 * columns).long()  # from all styles
    grid = reconstruction_grid(image_tokenizer, images[shown], columns=columns)
    return {**figures, "held_out_pictures": len(images)}, grid


def config_of(report: Path) -> EvaluationConfig:
    """The configuration that a `report.json` was made with.

    Raises:
        DataError: if it is no such file.
        ConfigError: if another version of MARS made it, and what it holds means nothing here.
    """
    return from_dict(EvaluationConfig, _read(report)["config"])


def _read(report: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(report.read_text("utf-8"))
        if not isinstance(found["config"], dict):
            raise TypeError("config is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{report} must be a report.json of `mars eval`, got: {error}") from None
    return found


def replay(
    pipe: MarsPipeline, report: Path, *, out: Path, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], list[str]]:
    """Measures again what a report says was measured, into another folder.

    Returns:
        The new report, and what differs from the old one: a line for each number, empty if all is the same.

    Raises:
        DataError: if `report` is no report.json.
        ModelError: if the model is not the one that it is of.
    """
    old = _read(report)
    wanted = old.get("model", {}).get("visual_digest")
    if wanted != pipe.model.visual_digest:
        raise ModelError(f"the report is of the model {str(wanted)[:19]}, got {pipe.model.visual_digest[:19]}")
    new = evaluate(pipe, replace(config_of(report), out=out), say=say)
    checked = [{name: value for name, value in one.items() if name not in UNCHECKED} for one in (old, new)]
    found = list(_differences(checked[0], json.loads(json.dumps(checked[1])), where=""))
    if old.get("predictions_digest") != new["predictions_digest"]:
        found.append("pictures or what was found in them: compare predictions.jsonl of both")
    return new, found


def _differences(one: Any, other: Any, *, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), where=f"{where}.{key}" if where else key)
    elif one != other:
        yield f"{where}: {one} then, {other} now"


def _circumstances(pipe: MarsPipeline, config: EvaluationConfig) -> dict[str, Any]:
    """All that the figures depend on."""
    info, settings = pipe.model.info, {"seed": config.seed, "sampling": asdict(config.sampling), "batch": BATCH}
    if config.scorer != EvaluationConfig.scorer:
        settings["scorer"] = config.scorer  # reports of before scorers know no other
    if config.emoji is not None:
        if not config.emoji.pictures.is_file():
            raise DataError(f"no picture shard at {config.emoji.pictures}; make it with `mars data emoji`")
        with config.emoji.pictures.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settings |= {
            "prompts": config.emoji.prompts,
            "candidates": CANDIDATES,
            "pool_per_style": POOL,
            "floor_pictures": FLOOR_PICTURES,
            "features": PACKAGE,
            "pictures": config.emoji.pictures.name,
            "pictures_digest": f"sha256:{digest}",
        }
    versions = {
        "mars": mars.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    return {
        "model": {
            "name": info.name,
            "language": info.language,
            "language_digest": info.language_digest,
            "visual_digest": pipe.model.visual_digest,
            "picture_size": pipe.sizes[0],
        },
        "config": to_dict(config),
        "settings": settings,
        "versions": {**versions, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
    }
