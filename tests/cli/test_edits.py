from collections.abc import Callable
from pathlib import Path

from mars.checkpoint import codes_digest, load_image_tokenizer
from mars.data.documents import CodedImage, read_documents

Run = Callable[..., tuple[int, str, str]]


def test_edits_are_written_as_codes_of_the_image_tokenizer(run: Run, tiny_model: Path) -> None:
    code, out, err = run("data", "edits", "--count", 5, "--size", 64, "--image-tokenizer", tiny_model)
    assert (code, out, err) == (0, "data/edits.parquet: 5 edits\n", "")
    documents, digest = read_documents(Path("data/edits.parquet"))
    assert len(documents) == 5
    assert digest == codes_digest(load_image_tokenizer(tiny_model)[0])
    grids = [part for part in documents[0].parts if isinstance(part, CodedImage)]
    assert [grid.codes.shape for grid in grids] == [(4, 4), (4, 4)]
    Path("data/edits.parquet").rename("first.parquet")
    run("data", "edits", "--count", 5, "--size", 64, "--image-tokenizer", tiny_model)
    assert Path("data/edits.parquet").read_bytes() == Path("first.parquet").read_bytes()


def test_a_folder_without_an_image_tokenizer_is_one_line(run: Run, tmp_path: Path) -> None:
    code, out, err = run("data", "edits", "--image-tokenizer", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("mars: no image_tokenizer.json")
    assert not Path("data").exists()
