import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mars.checkpoint import load_image_tokenizer
from mars.data import encode
from mars.data.crops import Sizes
from mars.data.encode import encode_block, encode_pictures
from mars.data.shards import Picture, Record, read_codes, read_pictures, write_pictures
from mars.errors import DataError
from mars.image_tokenizer.model import ImageTokenizer


@pytest.fixture
def tokenizer(tiny_model: Path) -> ImageTokenizer:
    return load_image_tokenizer(tiny_model)[0]


def picture(index: int, content: bytes) -> Picture:
    record = Record(key=f"k{index}", concept="c", style="s", split="train", source="t", licence="CC0", captions=())
    return Picture(record=record, content=content)


def png(size: tuple[int, int], seed: int = 0) -> bytes:
    file = io.BytesIO()
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, *sizes: tuple[int, int]) -> Path:
    write_pictures(path, [picture(index, png(size, index)) for index, size in enumerate(sizes)])
    return path


@pytest.mark.parametrize("block", [64, 7])
def test_codes_are_those_of_each_picture_alone(
    tiny_pictures: Path, tmp_path: Path, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(encode, "BLOCK", block)
    told: list[tuple[int, int]] = []
    out = tmp_path / "new" / "codes.parquet"
    count = encode_pictures(
        tiny_pictures, tokenizer=tokenizer, digest="d", out=out, progress=lambda *done: told.append(done)
    )
    assert count == 32
    assert told == [(done, 32) for done in ([32] if block == 64 else [7, 14, 21, 28, 32])]
    found, digest = read_codes(out)
    assert digest == "d"
    for one, item in zip(read_pictures(tiny_pictures), found, strict=True):
        assert item.record == one.record
        pixels = np.asarray(Image.open(io.BytesIO(one.content))).copy()
        with torch.no_grad():
            wanted = tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
        assert item.codes.tolist() == wanted.tolist()
    assert len({item.codes.tobytes() for item in found}) > 16


def test_pictures_of_several_shapes_have_grids_of_their_own(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    shapes = [(32, 32), (48, 32), (32, 32), (16, 64)]
    encode_pictures(shard(tmp_path / "a.tar", *shapes), tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet")
    found, _ = read_codes(tmp_path / "a.parquet")
    assert [item.record.key for item in found] == ["k0", "k1", "k2", "k3"]
    assert [item.codes.shape for item in found] == [(height // 16, width // 16) for width, height in shapes]


def test_a_picture_is_encoded_at_each_size(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    sizes = Sizes(factor=16, sizes=(32, 64), aspect_buckets=True)
    pictures = shard(tmp_path / "a.tar", (100, 100), (90, 40))
    count = encode_pictures(pictures, tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet", sizes=sizes)
    assert count == 2
    found, _ = read_codes(tmp_path / "a.parquet")
    assert [(item.record.key, item.codes.shape) for item in found] == [
        ("k0", (2, 2)), ("k0", (4, 4)), ("k1", (2, 2)), ("k1", (4, 4)),
    ]  # fmt: skip


def test_a_batch_holds_so_many_pixels(tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [picture(index, png((32, 32), index)) for index in range(5)]
    seen: list[int] = []
    real = tokenizer.encode

    def counted(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return real(images)

    monkeypatch.setattr(tokenizer, "encode", counted)
    monkeypatch.setattr(encode, "PIXELS", 2 * 32 * 32)
    encode_block(pictures, tokenizer=tokenizer, sizes=Sizes(factor=16))
    encode_block(pictures[:1], tokenizer=tokenizer, sizes=Sizes(factor=16, sizes=(64,)))
    assert seen == [2, 2, 1, 1]


def test_what_cannot_be_encoded_says_why_and_the_others_are(tokenizer: ImageTokenizer, spoiled_folder: Any) -> None:
    bad = {name: word for name, word in spoiled_folder.refused.items() if word not in ("UTF-8", "no picture")}
    assert len(bad) >= 100
    files: dict[str, str | None] = dict.fromkeys(spoiled_folder.ingested) | bad
    contents = [((spoiled_folder.path / name).read_bytes(), word) for name, word in files.items()]
    pictures = [picture(index, content) for index, (content, _) in enumerate(contents)]
    outcomes = encode_block(pictures, tokenizer=tokenizer, sizes=Sizes(factor=16, sizes=(32,)))
    for (_, reason), outcome in zip(contents, outcomes, strict=True):
        if reason is None:
            assert not isinstance(outcome, str)
            assert [codes.shape for codes in outcome] == [(2, 2)]
        else:
            assert isinstance(outcome, str), reason
            assert reason in outcome
            assert "\n" not in outcome
            assert " at 0x" not in outcome  # an address differs from run to run


@pytest.mark.parametrize(
    ("content", "reason"),
    [(png((40, 32)), "multiples of 16, got 40x32; give --size"), (png((32, 32))[:60], "damaged"), (b"", "empty file")],
)
def test_one_file_is_written_of_all_pictures_or_not_at_all(
    tmp_path: Path, tokenizer: ImageTokenizer, content: bytes, reason: str
) -> None:
    write_pictures(tmp_path / "a.tar", [picture(0, png((32, 32))), picture(1, content)])
    with pytest.raises(DataError, match=rf"picture k1 of .*a.tar cannot be encoded: .*{reason}"):
        encode_pictures(tmp_path / "a.tar", tokenizer=tokenizer, digest="d", out=tmp_path / "a.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
