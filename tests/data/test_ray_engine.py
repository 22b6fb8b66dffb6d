import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mars.checkpoint import codes_digest, load_image_tokenizer
from mars.data.code_folder import EncodedSet, encode_folder, local_engine
from mars.data.crops import Sizes
from mars.data.encode import Encoder
from mars.data.ray_engine import ray_engine
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Picture, Record
from mars.errors import DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three shards, in which every tenth picture is damaged."""
    with ShardFolder(tmp_path / "in", settings={}, max_pictures=40) as folder:
        for number in range(100):
            file = io.BytesIO()
            cells = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((60 + number, 70)).save(file, "PNG")
            content = file.getvalue()[:200] if number % 10 == 3 else file.getvalue()
            record = Record(key=f"k{number}", concept="", style="", split="train", source="", licence="", captions=())
            folder.add(Picture(record=record, content=content), consumed=number)
        folder.finish()
    return tmp_path / "in"


@pytest.fixture
def encoder(tiny_model: Path) -> Encoder:
    digest = codes_digest(load_image_tokenizer(tiny_model)[0])
    sizes = Sizes(factor=16, sizes=(48, 96), aspect_buckets=True)
    return Encoder(load=load_image_tokenizer, folder=tiny_model, digest=digest, sizes=sizes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_writes_the_bytes_that_the_local_engine_writes(pictures: Path, encoder: Encoder, tmp_path: Path) -> None:
    found = encode_folder(pictures, encoder=encoder, out=tmp_path / "local", engine=local_engine(workers=1))
    assert found == EncodedSet(pictures=90, refused=10)
    told: list[tuple[int, int | None]] = []
    engine = ray_engine(workers=2)
    out = tmp_path / "ray"
    found = encode_folder(pictures, encoder=encoder, out=out, engine=engine, progress=lambda *done: told.append(done))
    assert found == EncodedSet(pictures=90, refused=10)
    assert contents(out) == contents(tmp_path / "local")
    assert told[-1] == (100, 100)
    # A run that was stopped by one engine is continued by the other; an error in a task is one line.
    (out / "shard-000001.json").unlink()
    (out / "dataset.json").write_text(json.dumps(json.loads((out / "dataset.json").read_text()) | {"finished": False}))
    shard = pictures / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"shard-000001.tar is not a picture shard") as caught:
        encode_folder(pictures, encoder=encoder, out=out, engine=engine)
    assert "\n" not in str(caught.value)
    shard.write_bytes(whole)
    encode_folder(pictures, encoder=encoder, out=out, engine=engine)
    assert contents(out) == contents(tmp_path / "local")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'mars-t2i\[ray\]'"):
        ray_engine(workers=1)
