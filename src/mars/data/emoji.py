"""Emoji artwork with English and Chinese captions: a real, small, bilingual picture set.

Artwork comes from npm's Iconify packages, names and tags from the Unicode CLDR annotations in `emojibase-data`. Only
sets under Apache-2.0, MIT and CC-BY-4.0 are taken; every picture records its source and licence. Skin-tone variants are
left out. What is held out is fixed by hash: whole concepts, whole pictures, and tags (as paraphrases of a name).
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mars.data.shards import Caption, Picture, Record
from mars.errors import DataError

HELD_OUT_PERCENT = 4
"""Share of the concepts, and again of the pictures, that training never sees."""
PARAPHRASE_PERCENT = 40
"""Share of a concept's tags that training never sees."""
MARGIN = 1 / 16
"""White border on each side, as a share of the artwork's width."""
REQUESTS_EACH = 10
"""Ways to ask for each picture, in each language."""
COMPONENT_GROUP = 2
"""Emoji group of skin tones and hair: parts, not pictures."""
REQUESTS = {
    "en": (
        "a picture of {}", "draw {}", "{} emoji", "an icon of {}", "show me {}", "I want {}", "paint {}, please",
        "a drawing of {}", "can you draw {}?", "make me {}", "an image of {}, please", "give me {}", "let me see {}",
        "{}, as an icon", "I would like to see {}", "create {} for us", "how about {}?", "sketch {}", "the emoji {}",
        "now {}", "please paint {}", "draw {}, please", "could you make {} for me?", "please show us {}", "I need {}",
        "draw me {}", "would you draw {} here?", "generate {}", "generate an image of {}", "a photo of {}",
        "this is {}", "here is {}", "a simple drawing of {} on white", "my friend likes {}", "paint {} for my friend",
        "please make a picture of {} for us", "a small {}", "look, {}!", "{} please", "{}, thanks", "a sticker of {}",
        "hello, I want to see {}", "what does {} look like?", "design {} for my page", "one {}", "please add {} here",
    ),
    "zh": (
        "画{}", "{}的图片", "一张{}的画", "{}表情", "给我看{}", "我想要{}", "来一个{}", "请画{}", "{}图标", "一个{}",
        "帮我画{}", "生成一张{}的图", "能画一个{}吗？", "我想看{}", "做一个{}", "画一幅{}", "{}，谢谢", "给我一张{}",
        "{}长什么样？", "表情：{}", "请帮我做一个{}", "请给我看看{}", "为我们画{}", "请你画出{}", "我要一张{}的图片",
        "能不能给我{}？", "这是{}", "看，{}！", "白色背景上的{}", "请生成{}的图像", "你好，我想看一个{}", "我需要{}",
        "一幅{}", "一张图：{}", "请问{}是什么样子？", "朋友喜欢{}", "给朋友画{}", "麻烦画一张{}", "{}贴纸",
        "设计一个{}", "请在这里画{}", "现在画{}",
    ),
}  # fmt: skip
"""How people ask for a picture; evaluation asks in other words (`evaluation.questions`)."""


@dataclass(frozen=True, kw_only=True)
class EmojiSet:
    """One style of artwork, and what a caption calls it."""

    package: str
    version: str
    source: str
    licence: str
    en: str
    zh: str


CLDR = ("emojibase-data", "17.0.0")
SETS = {
    "noto": EmojiSet(
        package="@iconify-json/noto", version="1.2.9", source="Noto Emoji, Google", licence="Apache-2.0",
        en="Noto style", zh="Noto 风格",
    ),
    "twemoji": EmojiSet(
        package="@iconify-json/twemoji", version="1.2.5", source="Twemoji, Twitter and contributors",
        licence="CC-BY-4.0", en="Twemoji style", zh="Twemoji 风格",
    ),
    "fluent-flat": EmojiSet(
        package="@iconify-json/fluent-emoji-flat", version="1.2.6", source="Fluent Emoji Flat, Microsoft",
        licence="MIT", en="flat Fluent style", zh="扁平 Fluent 风格",
    ),
    "noto-v1": EmojiSet(
        package="@iconify-json/noto-v1", version="1.2.5", source="Noto Emoji v1, Google", licence="Apache-2.0",
        en="old Noto style", zh="旧版 Noto 风格",
    ),
    "fluent": EmojiSet(
        package="@iconify-json/fluent-emoji", version="1.2.7", source="Fluent Emoji, Microsoft", licence="MIT",
        en="glossy Fluent style", zh="立体 Fluent 风格",
    ),
    "fxemoji": EmojiSet(
        package="@iconify-json/fxemoji", version="1.2.2", source="FxEmojis, Mozilla", licence="Apache-2.0",
        en="Firefox style", zh="Firefox 风格",
    ),
    "emojione": EmojiSet(
        package="@iconify-json/emojione", version="1.2.3", source="EmojiTwo, Emoji One", licence="CC-BY-4.0",
        en="EmojiTwo style", zh="EmojiTwo 风格",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What an emoji shows, in two languages."""

    hexcode: str
    names: dict[str, str]
    tags: dict[str, tuple[str, ...]]


def _percentile(text: str) -> int:
    """A number in 0..99 that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100


def fetch(package: str, version: str, cache: Path) -> Path:
    """Unpacks an npm package below `cache` (once) and returns its folder.

    Raises:
        DataError: if npm is missing or refuses.
    """
    folder = cache / f"{package.replace('/', '-').lstrip('@')}-{version}"
    if (folder / "package" / "package.json").is_file():
        return folder / "package"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as name:
            partial = Path(name)
            command = ["npm", "pack", "--silent", f"{package}@{version}", "--pack-destination", name]
            subprocess.run(command, check=True, capture_output=True, text=True)
            for archive in partial.glob("*.tgz"):
                with tarfile.open(archive) as tar:
                    # Python before 3.11.4 has no filters; npm has checked what it brought.
                    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                    tar.extractall(partial)
            shutil.rmtree(folder, ignore_errors=True)  # what an older version may have left half-unpacked
            folder.mkdir()
            (partial / "package").rename(folder / "package")
    except FileNotFoundError:
        raise DataError("the emoji artwork comes from npm packages, but `npm` was not found; install Node.js") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join((error.stderr or error.stdout).split()) or f"exit code {error.returncode}"
        raise DataError(f"npm could not fetch {package}@{version}: {reason}") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"npm brought a damaged {package}@{version} ({error}); try again") from error
    return folder / "package"


def load_concepts(cache: Path) -> list[Concept]:
    """All emoji that are pictures, with English and Chinese names and tags, in Unicode order."""
    folder = fetch(*CLDR, cache)
    english, chinese = (
        {entry["hexcode"]: entry for entry in json.loads((folder / language / "data.json").read_text("utf-8"))}
        for language in ("en", "zh")
    )
    concepts = []
    for code, entry in english.items():
        if entry.get("group") in (None, COMPONENT_GROUP) or code not in chinese:
            continue
        both = {"en": entry, "zh": chinese[code]}
        concepts.append(
            Concept(
                hexcode=code,
                names={language: item["label"] for language, item in both.items()},
                tags={language: tuple(item.get("tags") or ()) for language, item in both.items()},
            )
        )
    return concepts


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("&", "and").replace("’", "")).strip("-")


def _artwork(concept: Concept, icons: dict[str, Any], characters: dict[str, str]) -> dict[str, Any] | None:
    """The icon of a concept: by code point where the set has a table, else by the slug of its English name."""
    code = concept.hexcode.lower()
    slug = _slug(concept.names["en"])
    bare = code.replace("-fe0f", "")
    for name in (characters.get(code), characters.get(bare), slug, slug.replace("-", "")):
        alias = icons.get("aliases", {}).get(name)
        if alias and alias.keys() == {"parent"}:
            name = alias["parent"]
        if name in icons["icons"]:
            icon: dict[str, Any] = icons["icons"][name]
            return icon
    return None


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    side = max(width, height) * (1 + 2 * MARGIN)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def _render(svg: str, size: int) -> bytes | str:
    """PNG bytes of an SVG, or why the renderer fails (its filters panic on a few icons)."""
    import resvg_py

    try:
        with _without_standard_error():
            return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white"))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # it derives from BaseException alone
            raise
        return f"the renderer panics: {' '.join(str(error).split())[:200]}"


@contextmanager
def _without_standard_error() -> Iterator[None]:
    """Rust prints the trace of a panic there itself, before Python hears of it."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _wordings(tags: list[str], comma: str, *, seed: str, names: frozenset[str]) -> list[str]:
    """Tags as captions: all (up to four), each half of them, and a few chosen at random, so that no single one stands
    for the picture; without those that are `names` of other pictures ("train" is what a station has)."""
    half = -(-len(tags) // 2)
    dice = random.Random(f"tags {seed}")
    drawn = [dice.sample(tags, min(len(tags), dice.randint(1, 3))) for _ in range(3)]
    chosen = (tags[:4], tags[:half], tags[half:][::-1][:3], *drawn)
    texts = dict.fromkeys(comma.join(some) for some in chosen if some)
    return [text for text in texts if text.lower() not in names]


def _requests(name: str, language: str, *, seed: str) -> list[str]:
    """A name as people ask for it, in ten ways, of the English ones half with an article."""
    dice = random.Random(f"requests {seed}")
    article = {"en": "an " if name[0].lower() in "aeiou" else "a ", "zh": ""}[language]
    ways = dice.sample(REQUESTS[language], REQUESTS_EACH)
    return [way.format(dice.choice(("", article)) + name) for way in ways]


def _captions(concept: Concept, style: EmojiSet, names: dict[str, frozenset[str]]) -> tuple[Caption, ...]:
    """What is said of a picture; `names` are those of all concepts by language, in lower case."""
    captions = []
    for language, comma, words in (("en", ", ", style.en), ("zh", "，", style.zh)):
        name = concept.names[language]
        captions.append(Caption(text=name, language=language, kind="name"))
        captions.append(Caption(text=f"{name}{comma}{words}", language=language, kind="style"))
        tags = [tag for tag in concept.tags[language] if tag.lower() != name.lower()]
        secret = [tag for tag in tags if _percentile(f"tag {concept.hexcode} {tag}") < PARAPHRASE_PERCENT]
        known = [tag for tag in tags if tag not in secret]
        seed = f"{concept.hexcode} {language}"
        tagged = _wordings(known, comma, seed=seed, names=names[language])
        asked = {"request": _requests(name, language, seed=seed), "tags": tagged}
        captions += [Caption(text=text, language=language, kind=kind) for kind in asked for text in asked[kind]]
        if secret:
            captions.append(Caption(text=comma.join(secret[:4]), language=language, kind="paraphrase"))
    return tuple(captions)


def _split(concept: Concept, style: str) -> str:
    if _percentile(f"concept {concept.hexcode}") < HELD_OUT_PERCENT:
        return "concept"
    if _percentile(f"picture {concept.hexcode} {style}") < HELD_OUT_PERCENT:
        return "picture"
    return "train"


def make_emoji(
    *,
    cache: Path,
    size: int = 128,
    styles: tuple[str, ...] = tuple(SETS),
    count: int | None = None,
    refused: Callable[[str, str], None] | None = None,
) -> Iterator[Picture]:
    """Renders every emoji of every style as a (size, size) picture on white.

    Args:
        cache: where npm packages are unpacked; they are fetched once.
        size: pixels on each side.
        styles: names of `SETS`.
        count: concepts, the same at random in all styles, and all of a smaller count among those of a larger; null
            for all.
        refused: called with the key of each picture that cannot be drawn, and the reason.
    """
    concepts = load_concepts(cache)
    if count is not None:
        concepts = sorted(concepts, key=lambda one: hashlib.sha256(f"count {one.hexcode}".encode()).digest())[:count]
    names = {one: frozenset(concept.names[one].lower() for concept in concepts) for one in ("en", "zh")}
    for style in styles:
        chosen = SETS[style]
        folder = fetch(chosen.package, chosen.version, cache)
        icons = json.loads((folder / "icons.json").read_text("utf-8"))
        characters = json.loads((folder / "chars.json").read_text("utf-8"))
        found = [(concept, icon) for concept in concepts if (icon := _artwork(concept, icons, characters))]
        svgs = [_svg(icon, icons) for _, icon in found]
        with ProcessPoolExecutor() as pool:
            rendered = pool.map(_render, svgs, [size] * len(svgs), chunksize=16)
            for (concept, _), png in zip(found, rendered, strict=True):
                key = f"{style}-{concept.hexcode.lower()}"
                if isinstance(png, str):
                    if refused is not None:
                        refused(key, png)
                    continue
                record = Record(
                    key=key,
                    concept=concept.hexcode,
                    style=style,
                    split=_split(concept, style),
                    source=chosen.source,
                    licence=chosen.licence,
                    captions=_captions(concept, chosen, names),
                    width=size,
                    height=size,
                )
                yield Picture(record=record, content=png)
