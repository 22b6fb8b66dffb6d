import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mars.checkpoint import load_image_tokenizer
from mars.data import encode
from mars.data.encode import encode_pictures
from mars.data.shards import Picture, Record, read_codes, read_pictures, write_pictures
from mars.errors import DataError, ImageError, MarsError
from mars.image_tokenizer.model import ImageTokenizer


@pytest.fixture
def tokenizer(tiny_model: Path) -> ImageTokenizer:
    return load_image_tokenizer(tiny_model)[0]


def shard(path: Path, *sizes: tuple[int, int]) -> Path:
    def picture(index: int, size: tuple[int, int]) -> Picture:
        png = io.BytesIO()
        Image.new("RGB", size, (index * 40, 100, 200)).save(png, "PNG")
        record = Record(key=f"k{index}", concept="c", style="s", split="train", source="t", licence="CC0", captions=())
        return Picture(record=record, content=png.getvalue())

    write_pictures(path, [picture(index, size) for index, size in enumerate(sizes)])
    return path


@pytest.mark.parametrize("batch", [64, 7])
def test_codes_are_those_of_each_picture_alone(
    tiny_pictures: Path, tmp_path: Path, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(encode, "BATCH", batch)
    told: list[tuple[int, int]] = []
    out = tmp_path / "new" / "codes.parquet"
    count = encode_pictures(
        tiny_pictures, tokenizer=tokenizer, digest="d", out=out, progress=lambda *done: told.append(done)
    )
    assert count == 32
    assert told == [(done, 32) for done in ([32] if batch == 64 else [7, 14, 21, 28, 32])]
    found, digest = read_codes(out)
    assert digest == "d"
    for picture, item in zip(read_pictures(tiny_pictures), found, strict=True):
        assert item.record == picture.record
        pixels = np.asarray(Image.open(io.BytesIO(picture.content))).copy()
        with torch.no_grad():
            wanted = tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
        assert item.codes.tolist() == wanted.tolist()
    assert len({item.codes.tobytes() for item in found}) > 16


def test_pictures_of_several_sizes_are_one_line_and_leave_nothing(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    pictures = shard(tmp_path / "a.tar", (32, 32), (48, 32))
    with pytest.raises(DataError, match="must share one size, got several near k0"):
        encode_pictures(pictures, tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_sizes_that_differ_between_batches_are_one_line(
    tmp_path: Path, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 1)
    with pytest.raises(DataError, match="must share one size"):
        encode_pictures(
            shard(tmp_path / "a.tar", (32, 32), (48, 32)), tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet"
        )


def test_a_size_that_has_no_codes_is_one_line(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ImageError, match="must be multiples of 16, got 40x32"):
        encode_pictures(
            shard(tmp_path / "a.tar", (40, 32)), tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet"
        )


def test_a_damaged_picture_is_one_line(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    (picture,) = read_pictures(shard(tmp_path / "a.tar", (32, 32)))
    write_pictures(tmp_path / "b.tar", [Picture(record=picture.record, content=picture.content[:60])])
    with pytest.raises(MarsError):
        encode_pictures(tmp_path / "b.tar", tokenizer=tokenizer, digest="d", out=tmp_path / "b.parquet")
