import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.hard_pictures import main, name_nats
from mars.checkpoint import codes_digest
from mars.data.shards import Caption, CodedPicture, Record, read_codes, write_codes
from mars.errors import DataError
from mars.generation.sampling import Sampling
from mars.generation.scheduler import Finished, Scheduler
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import draw_order

NAMES = {
    "apple": {"en": "a", "zh": "果"},
    "star": {"en": "star", "zh": "星"},
    "flag": {"en": "a flag of mine", "zh": "旗"},
}


def picture(key: str, names: dict[str, str], codes: Any) -> CodedPicture:
    captions = tuple(Caption(text=text, language=language, kind="name") for language, text in names.items())
    captions += (Caption(text="x", language="en", kind="tags"),)
    record = Record(
        key=key, concept=key, style="a", split="train", source="a", licence="CC0-1.0", captions=captions
    )  # fmt: skip
    return CodedPicture(record=record, codes=np.asarray(codes, dtype=np.int32))


def coded(pipe: MarsPipeline) -> list[CodedPicture]:
    dice = np.random.default_rng(0)
    return [picture(key, names, dice.integers(0, 64, pipe.model.info.grids[0])) for key, names in NAMES.items()]


def test_nats_are_those_that_drawing_has(tiny_model: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_model, precision="fp32")
    order = draw_order(pipe, ["a", "果"], seed=3, sampling=Sampling(candidates=2))
    scheduler = Scheduler(pipe.model.transformer)
    prompts = {scheduler.submit(request): text for request, text in zip(order.requests, order.prompts, strict=True)}
    finished = []
    while scheduler.busy:
        finished += [one for one in scheduler.step() if isinstance(one, Finished)]
    assert len(finished) == 2
    for one in finished:
        for candidate in one.candidates:
            found = name_nats(pipe, [picture("k", {"en": prompts[one.ticket]}, candidate.codes)])
            assert found == {"k": pytest.approx(-float(candidate.likelihood), rel=1e-3)}


def test_a_picture_is_as_hard_as_the_harder_of_its_names(pipe: MarsPipeline) -> None:
    pictures = coded(pipe)
    together = name_nats(pipe, pictures)
    assert together.keys() == NAMES.keys()
    for one in pictures:
        names = NAMES[one.record.key].items()
        alone = [name_nats(pipe, [picture("k", dict([name]), one.codes)])["k"] for name in names]
        assert together[one.record.key] == pytest.approx(max(alone), rel=1e-4)
        assert not math.isclose(*alone, rel_tol=1e-6)


def test_the_hard_ones_are_a_shard(pipe: MarsPipeline, tiny_model: Path, tmp_path: Path) -> None:
    pictures, digest = coded(pipe), codes_digest(pipe.model.image_tokenizer)
    source, out = tmp_path / "codes.parquet", tmp_path / "new" / "hard.parquet"
    write_codes(source, pictures, tokenizer=digest)
    nats = name_nats(pipe, pictures)
    limit = min(nats.values())
    main([str(tiny_model), str(source), "--nats", str(limit + 0.01), "--out", str(out)])
    hard, found = read_codes(out)
    assert found == digest
    assert [one.record for one in hard] == [one.record for one in pictures if nats[one.record.key] > limit + 0.01]
    assert len(hard) == 2
    assert all(np.array_equal(one.codes, pictures[list(NAMES).index(one.record.key)].codes) for one in hard)
    with pytest.raises(DataError, match="no picture has more than 1e"):
        main([str(tiny_model), str(source), "--nats", "1e9", "--out", str(out)])
    write_codes(source, pictures, tokenizer="another")
    with pytest.raises(DataError, match="are not of the image tokenizer of"):
        main([str(tiny_model), str(source), "--out", str(out)])
