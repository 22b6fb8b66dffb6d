"""Picture sets to curate."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mars.data.ingestion.ingest import ingest
from mars.data.ingestion.records import CaptionColumn, Columns
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, Record
from tests.data.conftest import SpoiledFolder, art, encoded

MakePicture = Callable[..., Picture]


@pytest.fixture(scope="session")
def make_picture() -> MakePicture:
    """A picture with a key, a number that says what it shows, and captions as (text, language)."""

    def make(
        key: str = "a",
        *,
        number: int = 0,
        image: Image.Image | None = None,
        size: tuple[int, int] = (64, 64),
        captions: Iterable[tuple[str, str]] = (("a small red house on a hill", "en"),),
        kind: str = "PNG",
        url: str | None = None,
        source: str = "test",
    ) -> Picture:
        texts = tuple(Caption(text=text, language=language, kind="original") for text, language in captions)
        record = Record(
            key=key, concept=key, style="", split="train", source=source, licence="CC0-1.0", captions=texts, url=url
        )
        content = encoded(image or art(number, size=size), kind)
        return Picture(record=record, content=content, suffix={"PNG": "png", "JPEG": "jpg"}[kind])  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def write_set() -> Callable[[Path, Iterable[Picture]], Path]:
    """Writes pictures to a folder of small shards."""

    def write(folder: Path, pictures: Iterable[Picture]) -> Path:
        with ShardFolder(folder, settings={"command": "test"}, max_pictures=25) as shards:
            for place, picture in enumerate(pictures):
                shards.add(picture, consumed=place + 1)
            shards.finish()
        return folder

    return write


@pytest.fixture(scope="session")
def spoiled_set(spoiled_folder: SpoiledFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ingestion keeps of the spoiled folder."""
    columns = Columns(
        captions=(CaptionColumn.parse("text_en:en"), CaptionColumn.parse("text_zh:zh")), licence="CC0-1.0"
    )
    folder = tmp_path_factory.mktemp("set") / "set"
    ingest([spoiled_folder.path], out=folder, columns=columns, max_pictures=50)
    return folder


@pytest.fixture
def noise() -> Callable[[int], Image.Image]:
    """A grey picture without any colour, unlike that of another number."""

    def make(number: int) -> Image.Image:
        cells = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        return Image.fromarray(cells).resize((64, 64), Image.Resampling.BICUBIC)

    return make
