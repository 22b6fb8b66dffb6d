import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mars.data.shards import (
    Caption,
    CodedPicture,
    Picture,
    Record,
    read_codes,
    read_pictures,
    write_codes,
    write_pictures,
)
from mars.errors import DataError

CODES = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 8191))


def record(key: str) -> Record:
    captions = (
        Caption(text="a red apple", language="en", kind="name"),
        Caption(text="一个红苹果", language="zh", kind="paraphrase"),
    )
    return Record(
        key=key,
        concept="apple",
        style="flat",
        split="train",
        source="test",
        licence="CC0-1.0",
        captions=captions,
    )


def pictures(count: int = 3) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(record=record(f"test-{i}"), content=rng.bytes(1500 + 700 * i)) for i in range(count)]


def coded(count: int = 3) -> list[CodedPicture]:
    rng = np.random.default_rng(0)
    return [
        CodedPicture(record=record(f"test-{i}"), codes=rng.integers(0, 8192, (8, 8), dtype=np.int32))
        for i in range(count)
    ]


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_all(path: Path) -> list[Picture]:
    return list(read_pictures(path))


def one_line_error(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_pictures_come_back_as_they_were_written(tmp_path: Path) -> None:
    shard = tmp_path / "new" / "shard-000.tar"
    assert write_pictures(shard, iter(pictures())) == 3
    assert read_all(shard) == pictures()


def test_the_same_pictures_make_the_same_file(tmp_path: Path) -> None:
    write_pictures(tmp_path / "one.tar", pictures())
    write_pictures(tmp_path / "two.tar", pictures())
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_a_picture_shard_is_read_the_way_webdataset_reads_it(tmp_path: Path) -> None:
    # webdataset streams the tar and joins neighbours whose names are equal up to the first dot.
    write_pictures(tmp_path / "shard.tar", pictures())
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tmp_path / "shard.tar", "r|*") as tar:
        for member in tar:
            assert member.isreg()
            key, suffix = member.name.split(".", 1)
            assert key not in samples or key == list(samples)[-1]
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    assert list(samples) == ["test-0", "test-1", "test-2"]
    for sample, picture in zip(samples.values(), pictures(), strict=True):
        assert set(sample) == {"png", "json"}
        assert sample["png"] == picture.content
        meta = json.loads(sample["json"])
        assert meta["concept"] == "apple"
        assert [caption["text"] for caption in meta["captions"]] == ["a red apple", "一个红苹果"]


@settings(deadline=None, max_examples=25)
@given(grids=st.lists(CODES, min_size=1, max_size=4))
def test_codes_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, grids: list[np.ndarray]
) -> None:
    shard = tmp_path_factory.mktemp("codes") / "shard.parquet"
    items = [CodedPicture(record=record(f"test-{i}"), codes=grid) for i, grid in enumerate(grids)]
    assert write_codes(shard, items, tokenizer="digest") == len(grids)
    found, tokenizer = read_codes(shard)
    assert tokenizer == "digest"
    assert [item.record for item in found] == [item.record for item in items]
    for item, grid in zip(found, grids, strict=True):
        assert item.codes.dtype == np.int32
        np.testing.assert_array_equal(item.codes, grid)


def test_a_code_shard_names_its_columns_for_other_readers(tmp_path: Path) -> None:
    write_codes(tmp_path / "shard.parquet", coded(), tokenizer="digest")
    table = pq.read_table(tmp_path / "shard.parquet")
    assert table.schema.field("codes").type == pa.list_(pa.int16())
    assert {"key", "concept", "style", "split", "source", "licence", "captions", "rows", "columns"} <= set(
        table.column_names
    )


def test_a_code_shard_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one picture"):
        write_codes(tmp_path / "shard.parquet", [], tokenizer="digest")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [read_all, read_codes])
def test_a_missing_shard_says_how_to_make_one(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert "make it with `mars data" in one_line_error(read, tmp_path / "absent")


@pytest.mark.parametrize("read", [read_all, read_codes])
@pytest.mark.parametrize("content", [b"", b"just some text\n" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, read: Callable[[Path], object], content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert "is not a" in one_line_error(read, path)


@pytest.mark.parametrize("read", [read_all, read_codes])
def test_a_folder_is_no_shard(tmp_path: Path, read: Callable[[Path], object]) -> None:
    one_line_error(read, tmp_path)


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 6, 7, 8])
def test_a_truncated_picture_shard_is_refused_wherever_it_was_cut(tmp_path: Path, blocks: int) -> None:
    # The first picture takes a header, three blocks of PNG, a header and a block of JSON: 512 bytes each.
    write_pictures(tmp_path / "whole.tar", pictures())
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "whole.tar").read_bytes()[: 512 * blocks])
    one_line_error(read_all, cut)


@pytest.mark.parametrize(
    "members",
    [
        [("a.png", b"x")],
        [("a.png", b"x"), ("b.png", b"y")],
        [("a.json", b"{}")],
        [("a.png", b"x"), ("a.json", b"{}")],
        [("a.png", b"x"), ("a.json", b'"text"')],
        [("a.png", b"x"), ("a.json", b"not json")],
        [("a.png", b"x"), ("b.json", json.dumps(asdict(record("b"))).encode())],
    ],
    ids=[
        "no record",
        "two pictures",
        "no picture",
        "empty record",
        "text as record",
        "no JSON",
        "another's record",
    ],
)
def test_a_tar_of_other_pictures_is_refused(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    write_members(tmp_path / "shard.tar", members)
    one_line_error(read_all, tmp_path / "shard.tar")


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_truncated_code_shard_is_refused(tmp_path: Path, part: float) -> None:
    write_codes(tmp_path / "whole.parquet", coded(), tokenizer="digest")
    content = (tmp_path / "whole.parquet").read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[: int(part * len(content))])
    one_line_error(read_codes, cut)


def test_a_code_shard_with_damaged_pages_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "shard.parquet"
    write_codes(shard, coded(40), tokenizer="digest")
    content = bytearray(shard.read_bytes())
    content[50:400] = b"\xff" * 350
    shard.write_bytes(content)
    one_line_error(read_codes, shard)


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), path)
    one_line_error(read_codes, path)


def interrupted(items: list[Picture] | list[CodedPicture]) -> Iterator[object]:
    yield from items
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_pictures(tmp_path / "shard.tar", interrupted(pictures()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        write_codes(tmp_path / "shard.parquet", interrupted(coded()), tokenizer="digest")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    write_pictures(shard, pictures(1))
    with pytest.raises(KeyboardInterrupt):
        write_pictures(shard, interrupted(pictures()))  # type: ignore[arg-type]
    assert read_all(shard) == pictures(1)


def test_codes_that_do_not_fit_16_bits_are_refused_rather_than_changed(tmp_path: Path) -> None:
    codes = np.full((1, 1), 40_000, dtype=np.int32)
    with pytest.raises(DataError, match="40000"):
        write_codes(tmp_path / "s.parquet", [CodedPicture(record=record("a"), codes=codes)], tokenizer="digest")
    assert not list(tmp_path.iterdir())
