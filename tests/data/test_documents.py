from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mars.data.documents import (
    CodedImage,
    Document,
    DocumentLoader,
    Text,
    read_all_documents,
    read_documents,
    write_documents,
)
from mars.errors import DataError

CODES = np.arange(6, dtype=np.int32).reshape(2, 3)


def document(*parts: Text | CodedImage) -> Document:
    return Document(key="d", split="train", source="t", licence="CC0", parts=parts)


def plain(found: Document) -> list[Any]:
    return [part if isinstance(part, Text) else (part.role, part.codes.tolist()) for part in found.parts]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = [
        document(
            CodedImage(codes=CODES, role="source"),
            Text(text="把它变成蓝色", learned=False),
            CodedImage(codes=CODES + 32761),
        ),
        document(
            Text(text="a"),
            CodedImage(codes=CODES.T),
            Text(text=""),
            CodedImage(codes=CODES, role="read"),
            Text(text="b"),
        ),
    ]
    assert write_documents(tmp_path / "new" / "d.parquet", iter(written), tokenizer="digest") == 2
    found, digest = read_documents(tmp_path / "new" / "d.parquet")
    assert digest == "digest"
    assert [plain(one) for one in found] == [plain(one) for one in written]
    assert [one.key for one in found] == ["d", "d"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "must hold a text or an image, got none"),
        ((Text(text="a"), Text(text="b"), CodedImage(codes=CODES)), "has two texts side by side; make them one"),
        ((Text(text="a"),), "must hold an image that is drawn, or a learned text after an image"),
        ((CodedImage(codes=CODES, role="read"), Text(text="a", learned=False)), "must hold an image that is drawn"),
    ],
)
def test_a_document_that_teaches_nothing_is_one_line(parts: tuple[Text | CodedImage, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"document d {message}"):
        document(*parts)


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    with pytest.raises(DataError, match="no documents at .*d.parquet; make some with `mars data edits`"):
        read_documents(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is no file of documents"):
        read_documents(path)
    pq.write_table(pa.table({"key": ["a"]}).replace_schema_metadata({"image_tokenizer": "d"}), path)
    with pytest.raises(DataError, match="is no file of documents"):
        read_documents(path)


@pytest.mark.parametrize("change", [{"role": "drwan"}, {"rows": 4}, {"codes": None}])
def test_an_image_that_cannot_be_used_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "d.parquet"
    write_documents(path, [document(CodedImage(codes=CODES))], tokenizer="d")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["parts"][0] |= change
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(DataError, match="is no file of documents"):
        read_documents(path)


def test_nothing_is_written_of_what_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold at least one, got none"):
        write_documents(tmp_path / "d.parquet", [], tokenizer="d")
    with pytest.raises(DataError, match="codes must be below 32768 to be stored, got 40005"):
        write_documents(tmp_path / "d.parquet", [document(CodedImage(codes=CODES + 40000))], tokenizer="d")
    assert list(tmp_path.iterdir()) == []


def many(count: int) -> list[Document]:
    """Documents of three layouts."""
    found = []
    for index in range(count):
        image = CodedImage(codes=np.zeros([(2, 3), (3, 2), (2, 3)][index % 3], np.int32))
        parts = (Text(text="a"), image, Text(text="b"))[: 3 if index % 3 == 0 else 2]
        found.append(Document(key=f"{index}", split="train", source="t", licence="CC0", parts=parts))
    return found


def test_every_document_comes_once_an_epoch_and_batches_have_one_layout() -> None:
    loader = DocumentLoader(many(24), seed=1)
    epochs = [[loader.batch(number, 4) for number in range(start, start + 6)] for start in (0, 6)]
    for epoch in epochs:
        assert sorted(int(one.key) for batch in epoch for one in batch) == list(range(24))
        for batch in epoch:
            assert len({(len(one.parts), one.parts[1].codes.shape) for one in batch}) == 1  # type: ignore[union-attr]
    assert [[one.key for one in batch] for batch in epochs[0]] != [[one.key for one in batch] for batch in epochs[1]]


def test_a_batch_is_the_same_whatever_was_drawn_before_and_processes_share_it() -> None:
    one, other = (DocumentLoader(many(25), seed=1) for _ in range(2))
    wanted = [[document.key for document in one.batch(number, 4)] for number in range(20)]
    for number in (13, 2, 19):
        assert [document.key for document in other.batch(number, 4)] == wanted[number]
        parts = [[document.key for document in other.batch(number, 4, rank=rank, ranks=2)] for rank in range(2)]
        assert parts == [wanted[number][::2], wanted[number][1::2]]
    assert {key for batch in wanted for key in batch} == {f"{index}" for index in range(25)}
    assert all(len(batch) == 4 for batch in wanted)


def test_files_of_several_image_tokenizers_are_one_line(tmp_path: Path) -> None:
    for name in "ab":
        write_documents(tmp_path / name, [document(CodedImage(codes=CODES))], tokenizer=name)
    assert len(read_all_documents([tmp_path / "a", tmp_path / "a"])[0]) == 2
    with pytest.raises(DataError, match="must come from one image tokenizer, got 2"):
        read_all_documents([tmp_path / "a", tmp_path / "b"])
