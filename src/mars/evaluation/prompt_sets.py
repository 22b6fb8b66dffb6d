"""MS-COCO captions, T2I-CompBench and GenEval: their prompt files in, pictures where their own scorers look for them.

    GenEval         OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png ...
    T2I-CompBench   OUT/samples/PROMPT_000000.png ...
    MS-COCO         OUT/images/COCO_val2014_000000000042.png ..., OUT/captions.json as CLIPScore's scorer reads it

What their scorers need (detectors, VQA models) is not here; CLIP's figures and distances to true pictures are.
"""

import hashlib
import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

import mars
from mars.checkpoint import write_json
from mars.data.curation.clip import Clip
from mars.errors import DataError, RequestError
from mars.evaluation.agreement import agreement
from mars.evaluation.distribution import BUNDLED, described, distances, features_of, open_network
from mars.evaluation.drawing import BATCH, Artist, batches, pixels_digest
from mars.files import whole_file
from mars.generation.engine import Progress
from mars.picture import open_picture

COCO_PICTURES = 30_000
"""Of the usual zero-shot FID."""
SETTINGS, DRAWN = "settings.json", "drawn.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A picture to draw."""

    prompt: str
    file: str
    """Where it goes, below the folder."""


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """What an official file asks for."""

    orders: list[Order]
    texts: dict[str, str] = field(default_factory=dict)
    """Other files that the scorer reads, below the folder."""


def read_geneval(file: Path, *, n: int = 4, count: int | None = None) -> PromptFile:
    """`evaluation_metadata.jsonl`: a prompt and what the scorer looks for on each line; `n` pictures of each."""
    lines = [line for line in _text(file).splitlines() if line.strip()][:count]
    orders: list[Order] = []
    texts: dict[str, str] = {}
    for index, line in enumerate(lines):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}, line {index + 1}, must be a JSON object with a prompt, got {line[:60]}") from None
        texts[f"{index:05d}/metadata.jsonl"] = line + "\n"
        orders += [Order(prompt=prompt, file=f"{index:05d}/samples/{number:04d}.png") for number in range(n)]
    return PromptFile(orders=orders, texts=texts)


def read_compbench(file: Path, *, n: int = 10, count: int | None = None) -> PromptFile:
    """A category's file, such as `color_val.txt`: a prompt on each line; `n` pictures of each, numbered through."""
    prompts = [line.strip() for line in _text(file).splitlines() if line.strip()][:count]
    orders: list[Order] = []
    for prompt in prompts:
        if set("/_") & set(prompt) or len(prompt.encode()) > LONGEST_NAME - len("_000000.png"):
            raise DataError(
                f"the scorer takes prompts from file names, so they must be short, without / and _, got {prompt[:60]!r}"
            )
        for _ in range(n):
            orders.append(Order(prompt=prompt, file=f"samples/{prompt}_{len(orders):06d}.png"))
    return PromptFile(orders=orders)


def read_coco(file: Path, *, n: int = 1, count: int | None = None) -> PromptFile:
    """`captions_val2014.json`: at most `count` (30,000) captions of as many pictures, at random, always the same.

    Args:
        n: must be 1, since the name of a picture is that of the true one.
    """
    if n != 1:
        raise RequestError(f"MS-COCO has one picture for a caption, got n = {n}")
    try:
        table = json.loads(_text(file))
        names = {one["id"]: Path(one["file_name"]).stem for one in table["images"]}
        captions: dict[int, list[str]] = {}
        for one in sorted(table["annotations"], key=lambda one: one["id"]):
            captions.setdefault(one["image_id"], []).append(" ".join(one["caption"].split()))
        dice = random.Random("coco")
        chosen = dice.sample(sorted(captions), min(COCO_PICTURES if count is None else count, len(captions)))
        picked = {names[key]: dice.choice(captions[key]) for key in chosen}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} must be a captions_....json of MS-COCO, got one where {error!r}") from None
    orders = [Order(prompt=caption, file=f"images/{name}.png") for name, caption in picked.items()]
    return PromptFile(orders=orders, texts={"captions.json": json.dumps(picked, ensure_ascii=False, indent=0)})


READERS: dict[str, Callable[..., PromptFile]] = {
    "coco": read_coco,
    "t2i-compbench": read_compbench,
    "geneval": read_geneval,
}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} must be a prompt file, got: {error}") from None


def draw_prompt_file(
    artist: Artist, wanted: PromptFile, *, out: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Draws what is not there yet, so that a run that was cut short goes on; picture number i has the seed `seed + i`.

    Returns:
        What `drawn.jsonl` holds: file, prompt, seed and digest of the pixels of every picture.

    Raises:
        RequestError: if the folder holds pictures of another model, file or setting, or cannot be written.
        DataError: if the file asks for nothing.
        PromptError: if the model cannot read a prompt; nothing is drawn then.
    """
    if not wanted.orders:
        raise DataError("the prompt file must hold at least one prompt, got none")
    artist.pipe.check_prompts([order.prompt for order in wanted.orders])
    _claim(artist, wanted, out=out)
    for name, text in wanted.texts.items():
        with whole_file(out / name, error=RequestError) as partial:
            partial.write_text(text, "utf-8")
    lines: list[dict[str, Any]] = []
    for some in batches(wanted.orders):
        files = [out / order.file for order in some]
        if not all(file.is_file() for file in files):  # whole batches: rounding depends on who is drawn together
            drawn = artist.draw([order.prompt for order in some], first=len(lines))
            for file, drawing in zip(files, drawn, strict=True):
                with whole_file(file, error=RequestError) as partial:
                    drawing.image.save(partial, format="PNG")
        for order, file in zip(some, files, strict=True):
            with Image.open(file) as image:
                digest = pixels_digest(image)
            lines.append({**asdict(order), "seed": artist.seed + len(lines), "pixels": digest})
        if progress is not None:
            progress(len(lines), len(wanted.orders))
    with whole_file(out / DRAWN, error=RequestError) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return lines


def _claim(artist: Artist, wanted: PromptFile, *, out: Path) -> None:
    """Notes what the folder is for, and refuses one that is for something else."""
    settings = {
        "visual_digest": artist.pipe.model.visual_digest,
        "language_digest": artist.pipe.model.info.language_digest,
        "sampling": asdict(artist.sampling),
        "seed": artist.seed,
        "prompts": [order.prompt for order in wanted.orders],
    }
    file = out / SETTINGS
    if file.is_file():
        try:
            there = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            there = None
        if there != json.loads(json.dumps(settings)):
            raise RequestError(f"{out} holds pictures of another model, prompt file or setting; name another folder")
        return
    try:
        if out.is_dir() and any(out.iterdir()):
            raise RequestError(f"{out} must be new or of the same run, got a folder with something else; name another")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"the folder {out} cannot be made: {error.strerror or error}") from None
    write_json(file, settings)


def score_prompt_file(
    lines: Sequence[dict[str, Any]],
    *,
    artist: Artist,
    out: Path,
    clip: Path | None = None,
    true: Path | None = None,
    features: str | None = None,
) -> dict[str, Any]:
    """What can be said here of the pictures of `draw_prompt_file`, also written to `report.json`.

    Args:
        clip: a CLIP's folder, for CLIPScore and R-precision.
        true: a folder of true pictures, for FID and KID; their middle is taken, scaled to the size of the drawn ones.
        features: the network of FID and KID, as `distribution.open_network` takes it.

    Raises:
        ModelError: if a network cannot be opened.
        DataError: if there are fewer than two true pictures.
        ImageError: if one is damaged.
    """
    pictures = []
    for line in lines:
        with Image.open(out / line["file"]) as image:
            pictures.append(image.convert("RGB"))
    digest = hashlib.sha256((out / DRAWN).read_bytes()).hexdigest()
    report: dict[str, Any] = {
        "model": {"name": artist.pipe.model.info.name, "visual_digest": artist.pipe.model.visual_digest},
        "settings": {"sampling": asdict(artist.sampling), "seed": artist.seed, "batch": BATCH},
        "versions": {"mars": mars.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "pictures": len(lines),
        "prompts": len({line["prompt"] for line in lines}),
        "predictions_digest": f"sha256:{digest}",
    }
    if clip is not None:
        found = agreement(Clip(clip), pictures, [line["prompt"] for line in lines], seed=artist.seed)
        report["clip"] = {"network": clip.name, **found}
    if true is not None:
        name, files = features or BUNDLED, sorted(one for one in true.glob("*") if one.suffix.lower() in SUFFIXES)
        network = open_network(name)
        real = [ImageOps.fit(open_picture(one).convert("RGB"), pictures[0].size) for one in files[:COCO_PICTURES]]
        if len(real) < 2:
            raise DataError(f"{true} must hold at least 2 true pictures (PNG, JPEG or WebP), got {len(real)}")
        found = distances(features_of(network, real), features_of(network, pictures), seed=artist.seed)
        report["distribution"] = {"network": described(name), "true_pictures": len(real), **found}
    write_json(out / "report.json", report)
    return report
