from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.data.loader import Loader
from mars.data.shards import Caption, CodedPicture, Record, read_codes, write_codes
from mars.errors import DataError

KINDS = {"name": 0.5, "style": 0.35, "tags": 0.15}
LANGUAGES = {"en": 0.5, "zh": 0.5}


def load(*shards: Path, seed: int = 0, **weights: Any) -> Loader:
    return Loader(list(shards), seed=seed, **({"kinds": KINDS, "languages": LANGUAGES} | weights))


def coded(index: int, *, split: str = "train", captions: tuple[Caption, ...]) -> CodedPicture:
    record = Record(
        key=f"k{index}", concept=f"c{index}", style="s", split=split, source="t", licence="CC0", captions=captions
    )
    return CodedPicture(record=record, codes=np.full((1, 2), index, dtype=np.int32))


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(max_examples=20)
def test_every_picture_comes_once_per_epoch(tiny_codes: Path, seed: int, epoch: int) -> None:
    loader = load(tiny_codes, seed=seed)
    assert len(loader) == 24
    found = Counter(sample.codes.numpy().tobytes() for sample in loader.batch(epoch * 24, 24))
    train = [item for item in read_codes(tiny_codes)[0] if item.record.split == "train"]
    assert found == Counter(item.codes.astype(np.int64).tobytes() for item in train)


def test_epochs_and_seeds_have_orders_of_their_own(tiny_codes: Path) -> None:
    orders = {
        tuple(sample.codes.numpy().tobytes() for sample in load(tiny_codes, seed=seed).batch(epoch * 24, 24))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@given(start=st.integers(0, 200), size=st.integers(1, 40))
@settings(max_examples=20)
def test_a_resumed_loader_goes_on_with_the_same_samples(tiny_codes: Path, start: int, size: int) -> None:
    whole = load(tiny_codes)
    whole.batch(0, 7)
    for one, other in zip(load(tiny_codes).batch(start, size), whole.batch(0, start + size)[start:], strict=True):
        assert one.caption == other.caption
        assert one.codes.tolist() == other.codes.tolist()


@given(
    splits=st.lists(st.sampled_from(["train", "concept", "picture", "combination"]), min_size=1, max_size=8),
    kinds=st.lists(st.sampled_from(["name", "paraphrase", "tags", "other"]), min_size=1, max_size=4),
)
@settings(max_examples=25)
def test_held_out_pictures_and_paraphrases_are_never_seen(
    tmp_path_factory: pytest.TempPathFactory, splits: list[str], kinds: list[str]
) -> None:
    captions = tuple(
        Caption(text=f"{kind} {language}", language=language, kind=kind) for kind in kinds for language in ("en", "fr")
    )
    pictures = [coded(index, split=split, captions=captions) for index, split in enumerate(splits)]
    shard = tmp_path_factory.mktemp("held-out") / "a.parquet"
    write_codes(shard, pictures, tokenizer="t")
    if "train" not in splits or not KINDS.keys() & set(kinds):
        with pytest.raises(DataError, match="hold no picture to train on"):
            load(shard)
        return
    samples = load(shard).batch(0, 60)
    assert {splits[int(sample.codes[0, 0])] for sample in samples} == {"train"}
    assert {sample.caption.kind for sample in samples} <= KINDS.keys()
    assert {sample.caption.language for sample in samples} == {"en"}


def test_kinds_and_languages_come_as_often_as_asked(tiny_codes: Path) -> None:
    loader = load(tiny_codes, kinds={"name": 3, "style": 1}, languages={"en": 0.2, "zh": 0.8})
    samples = loader.batch(0, 3000)
    kinds, languages = (Counter(getattr(one.caption, name) for one in samples) for name in ("kind", "language"))
    assert kinds.keys() == {"name", "style"}
    assert kinds["name"] / 3000 == pytest.approx(0.75, abs=0.04)
    assert languages["zh"] / 3000 == pytest.approx(0.8, abs=0.04)


def test_a_language_of_weight_0_never_comes(tiny_codes: Path) -> None:
    samples = load(tiny_codes, languages={"en": 0.0, "zh": 1.0}).batch(0, 100)
    assert {sample.caption.language for sample in samples} == {"zh"}


def test_several_shards_are_one_set(tmp_path: Path, tiny_codes: Path) -> None:
    pictures, digest = read_codes(tiny_codes)
    write_codes(tmp_path / "more.parquet", [replace(item) for item in pictures[:5]], tokenizer=digest)
    assert len(load(tiny_codes, tmp_path / "more.parquet")) == 29
    write_codes(tmp_path / "other.parquet", pictures[:5], tokenizer="another")
    with pytest.raises(DataError, match="must come from one image tokenizer, got 2"):
        load(tiny_codes, tmp_path / "other.parquet")


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no code shard at"):
        load(tmp_path / "none.parquet")
