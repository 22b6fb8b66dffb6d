"""A folder of pictures as people have them: good ones, and 200 that are spoiled in every way that we know."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOOD = 60


@dataclass(frozen=True)
class SpoiledFolder:
    """A picture `a/NAME.png` has `a/NAME.json` beside it: `text_en`, `text_zh` and `url`, which is BASE/a/NAME.png."""

    path: Path
    good: list[str] = field(default_factory=list)
    """Names below `path` of pictures with nothing wrong."""
    refused: dict[str, str] = field(default_factory=dict)
    """Names of files that no shard may hold, with a word of the reason that must be told."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Names of sound files that show what another one shows, with that one's name: as the same bytes, other bytes of
    the same pixels, smaller, or as JPEG."""
    mislabelled: list[str] = field(default_factory=list)
    """Names of sound files whose captions are in each other's language, or in a third one."""
    extreme: list[str] = field(default_factory=list)
    """Names of sound files that are 16 to 31 pixels high and 40 times as wide."""
    base: str = "https://pictures.example"

    @property
    def ingested(self) -> list[str]:
        """Names of all that ingestion keeps, in order."""
        return sorted([*self.good, *self.duplicates, *self.mislabelled, *self.extreme])

    def name(self, url: str | None) -> str:
        """The name below `path` of the file that has this URL."""
        assert url is not None
        return url.removeprefix(f"{self.base}/")


def art(number: int, *, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture unlike that of any other number: smooth blobs of colour."""
    cells = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header tells any size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 64))]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


def captions(number: int) -> dict[str, str]:
    """One caption per language, different for different numbers."""
    from mars.data.scene_words import captions_of
    from mars.data.scenes import make_scene

    texts = {one.language: one.text for one in captions_of(make_scene(number, seed=1)) if one.kind == "scene"}
    return {
        "text_en": f"{texts['en']}, picture number {number} of the series",
        "text_zh": f"{texts['zh']}，这是第{number}幅画",
    }


@cache
def _huge() -> bytes:
    """A sound picture of a few kilobytes and more pixels than anybody wants to decode."""
    return encoded(Image.new("1", (8_100, 8_000)), compress_level=1)


def _spoil_bytes(number: int) -> dict[str, tuple[bytes, str]]:
    """Files that are refused for what is in them: suffix and kind of damage, to bytes and a word of the reason."""
    whole = {
        "png": encoded(art(number)),
        "jpg": encoded(art(number), "JPEG", quality=90),
        "webp": encoded(art(number), "WEBP", quality=90),
    }
    cut = {kind: content[: len(content) * (2 + number % 7) // 10] for kind, content in whole.items()}
    flipped = bytearray(whole["png"])
    flipped[len(flipped) // 2] ^= 0xFF
    noise = np.random.default_rng(number).bytes(3000)
    small = (1 + number % 15, 64)
    return {
        "cut.png": (cut["png"], "damaged"),
        "cut.jpg": (cut["jpg"], "damaged"),
        "cut.webp": (cut["webp"], "damaged"),
        "flipped.png": (bytes(flipped), "damaged"),
        "empty.png": (b"", "empty"),
        "page.jpg": (b"<html><body>404 not found</body></html>" * (number + 1), "not a picture"),
        "noise.webp": (noise, "not a picture"),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "not a picture"),
        "bomb.png": (png_that_claims(20_000 + number, 20_000), "too many pixels"),
        "huge.png": (_huge(), "too many pixels"),
        "tiny.png": (encoded(art(number, size=small)), "too small"),
        "tiny.gif": (encoded(art(number, size=small[::-1]), "GIF"), "too small"),
    }


@pytest.fixture(scope="session")
def picture_file() -> Callable[..., bytes]:
    """The bytes of a small picture: its number, the format as PIL calls it, and options of `save`."""

    def file(number: int, kind: str = "PNG", **options: object) -> bytes:
        return encoded(art(number), kind, **options)

    return file


def write_spoiled(folder: Path) -> SpoiledFolder:
    """Writes good pictures and 200 spoiled ones into a folder; always the same."""
    made = SpoiledFolder(folder)

    def put(name: str, content: bytes, texts: dict[str, str]) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        fields = {**texts, "url": f"{made.base}/{name}"}
        path.with_suffix(".json").write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
        return name

    for number in range(GOOD):  # of three kinds, in two folders
        suffix, kind = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[number % 3]
        name = f"{'ab'[number % 2]}/good-{number:03d}.{suffix}"
        made.good.append(put(name, encoded(art(number), kind, quality=92), captions(number)))
    for number in range(10):  # 10 x (12 + 2)
        for damage, (content, word) in _spoil_bytes(1000 + number).items():
            stem, suffix = damage.split(".")
            made.refused[put(f"c/{stem}-{suffix}-{number}.{suffix}", content, captions(number))] = word
        name = put(f"c/letters-{number}.png", encoded(art(2000 + number)), {})
        (folder / name).with_suffix(".json").write_bytes('{"text_zh": "一只黑色的猫坐在窗边"}'.encode("gb18030"))
        made.refused[name] = "UTF-8"
        (folder / "c" / f"alone-{number}.json").write_text("{}")
        made.refused[f"c/alone-{number}.json"] = "no picture"
    for number in range(30):
        shown = art(number)
        original, texts = made.good[number], captions(5000 + number)
        copies = {
            "same": ((folder / original).read_bytes(), original.rsplit(".")[-1]),
            "pixels": (encoded(Image.open(folder / original).convert("RGB"), "PNG", compress_level=1), "png"),
            "smaller": (encoded(shown.resize((48, 48), Image.Resampling.LANCZOS)), "png"),
            "jpeg": (encoded(shown, "JPEG", quality=60), "jpg"),
        }
        kind = list(copies)[number % 4]
        content, suffix = copies[kind]
        made.duplicates[put(f"d/{kind}-{number}.{suffix}", content, texts)] = original
    for number in range(20):
        texts = captions(6000 + number)
        if number % 2:
            texts = {"text_en": texts["text_zh"], "text_zh": texts["text_en"]}
        else:
            texts["text_en"] = "В этом году зима пришла рано, и снег лежит на крышах"
        made.mislabelled.append(put(f"e/mislabelled-{number}.png", encoded(art(3000 + number)), texts))
    for number in range(10):
        height = 16 + number
        content = encoded(art(4000 + number, size=(40 * height, height)))
        made.extreme.append(put(f"e/extreme-{number}.png", content, captions(7000 + number)))
    return made


@pytest.fixture(scope="session")
def spoil() -> Callable[[Path], SpoiledFolder]:
    """Writes good pictures and 200 spoiled ones into a folder; always the same."""
    return write_spoiled


@pytest.fixture(scope="session")
def spoiled_folder(tmp_path_factory: pytest.TempPathFactory, spoil: Callable[[Path], SpoiledFolder]) -> SpoiledFolder:
    """60 good pictures and 200 that are spoiled. Read only."""
    return spoil(tmp_path_factory.mktemp("spoiled"))
