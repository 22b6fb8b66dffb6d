from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars.data.code_table import read_tables
from mars.data.loader import WINDOW, Loader, Sample, padding
from mars.data.shards import Caption, CodedPicture, Record, read_codes, write_codes
from mars.errors import DataError

ROOT = Path(__file__).parents[2]
KINDS = {"name": 0.5, "style": 0.35, "tags": 0.15}
LANGUAGES = {"en": 0.5, "zh": 0.5}


def load(*shards: Path, seed: int = 0, **weights: Any) -> Loader:
    return Loader(list(shards), seed=seed, **({"kinds": KINDS, "languages": LANGUAGES} | weights))


def same(one: list[Sample], other: list[Sample]) -> bool:
    return [(a.codes.tolist(), a.caption) for a in one] == [(b.codes.tolist(), b.caption) for b in other]


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


def test_what_is_no_code_shard_is_one_line(tmp_path: Path, tiny_codes: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"split": ["train"]}), tmp_path / "other.parquet")
    pq.write_table(pq.read_table(tiny_codes).drop(["captions"]), tmp_path / "bare.parquet")
    for name in ("text", "other", "bare"):
        with pytest.raises(DataError, match=rf"{name}.parquet is not a code shard .* make it with") as caught:
            load(tmp_path / f"{name}.parquet")
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no code shard at .*empty"):
        load(tmp_path / "empty")


def test_a_folder_is_all_the_shards_below_it(tmp_path: Path, tiny_codes: Path) -> None:
    pictures, digest = read_codes(tiny_codes)
    write_codes(tmp_path / "b" / "1.parquet", pictures[12:24], tokenizer=digest)
    write_codes(tmp_path / "a.parquet", pictures[:12], tokenizer=digest)
    (tmp_path / ".half.parquet.partial").write_text("of a killed run")
    (tmp_path / ".hidden.parquet").write_text("")
    (tmp_path / "quarantine.jsonl").write_text("")
    assert same(load(tmp_path).batch(0, 24), load(tiny_codes).batch(0, 24))


def test_held_out_splits_can_be_read_by_name(tiny_codes: Path) -> None:
    assert len(load(tiny_codes, splits=("concept", "picture"))) == 8
    with pytest.raises(DataError, match=r"hold no picture .* splits: \['none'\]"):
        load(tiny_codes, splits=("none",))


def write_grids(path: Path, pictures: dict[tuple[int, int], int]) -> Path:
    """So many pictures of each grid; the first code of each is its number, and its caption too."""
    items = []
    for (rows, columns), count in pictures.items():
        for number in range(count):
            text = Caption(text=f"{rows}x{columns} {number} " + "long " * (number % 7), language="en", kind="name")
            item = coded(number, captions=(text,))
            items.append(replace(item, codes=np.full((rows, columns), number, dtype=np.int32)))
    write_codes(path, items, tokenizer="t")
    return path


GRIDS = st.dictionaries(st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 20), min_size=1, max_size=4)


@given(grids=GRIDS, size=st.integers(1, 9), epochs=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_batches_have_one_grid_and_epochs_every_picture(
    tmp_path_factory: pytest.TempPathFactory, grids: dict[tuple[int, int], int], size: int, epochs: int
) -> None:
    shard = write_grids(tmp_path_factory.mktemp("grids") / "a.parquet", grids)
    loader = load(shard)
    assert set(loader.grids) == grids.keys()
    batches = sum(epochs * count // size for count in grids.values())
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for number in range(batches):
        batch = loader.batch(number * size, size)
        (grid,) = {tuple(sample.codes.shape) for sample in batch}
        assert all(
            sample.caption.text.startswith(f"{grid[0]}x{grid[1]} {int(sample.codes[0, 0])} ") for sample in batch
        )
        found.update((grid, int(sample.codes[0, 0])) for sample in batch)
        assert same(load(shard).batch(number * size, size), batch)
    for grid, count in grids.items():
        times = [found[grid, number] for number in range(count)]
        assert max(times) <= epochs
        assert epochs * count - sum(times) < size


def test_grids_take_turns_in_no_fixed_order(tmp_path: Path) -> None:
    loader = load(write_grids(tmp_path / "a.parquet", {(1, 1): 40, (1, 2): 40}))
    turns = [tuple(loader.batch(number * 4, 4)[0].codes.shape) for number in range(40)]
    assert Counter(turns[:20]) == Counter(turns[20:]) == {(1, 1): 10, (1, 2): 10}
    assert turns[:20] != turns[20:]
    assert len({tuple(turns[place : place + 2]) for place in range(40)}) > 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_share_the_batch_that_one_process_would_have(tmp_path: Path, ranks: int) -> None:
    loader = load(write_grids(tmp_path / "a.parquet", {(1, 1): 40, (2, 2): 23}))
    for start in range(0, 144, 12):
        whole = loader.batch(start, 12)
        by_length = loader.batch_by_length(start, 12, length=lambda caption: len(caption.text))
        for rank in range(ranks):
            assert same(loader.batch(start, 12, rank=rank, ranks=ranks), whole[rank::ranks])
            part = loader.batch_by_length(start, 12, length=lambda caption: len(caption.text), rank=rank, ranks=ranks)
            assert same(part, by_length[rank::ranks])


def test_batches_by_length_hold_the_same_samples_in_another_order(tiny_codes: Path) -> None:
    def length(caption: Caption) -> int:
        return len(caption.text)

    size = 4
    window = [load(tiny_codes).batch_by_length(number * size, size, length=length) for number in range(WINDOW)]
    shuffled = [sample for batch in window for sample in batch]
    plain = load(tiny_codes).batch(0, WINDOW * size)
    names = [Counter((sample.codes.numpy().tobytes(), sample.caption) for sample in some) for some in (shuffled, plain)]
    assert names[0] == names[1]
    assert [length(batch[0].caption) for batch in window] != sorted(length(batch[0].caption) for batch in window)
    for number in (WINDOW - 1, WINDOW, 3):
        again = load(tiny_codes).batch_by_length(number * size, size, length=length)
        assert number == WINDOW or same(again, window[number])


def test_padding_is_the_share_of_positions_without_an_id() -> None:
    assert padding([4, 4]) == 0
    assert padding([1, 3, 2]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", [8, 32])
def test_batches_by_length_pad_less_than_a_tenth(size: int) -> None:
    loader = Loader(
        [ROOT / "assets/codes/emoji.parquet", ROOT / "assets/codes/scenes.parquet"],
        seed=0,
        kinds=KINDS | {"scene": 1.0},
        languages=LANGUAGES,
    )

    def share(batches: list[list[Sample]]) -> float:
        lengths = [[len(sample.caption.text.encode()) for sample in batch] for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)

    def length(caption: Caption) -> int:
        return len(caption.text.encode())

    starts = range(0, WINDOW * size, size)
    assert share([loader.batch_by_length(start, size, length=length) for start in starts]) < 0.1
    assert share([loader.batch(start, size) for start in starts]) > 0.4


def test_pairs_are_the_same_picture_at_two_sizes(tmp_path: Path) -> None:
    write_grids(tmp_path / "low.parquet", {(2, 2): 9, (1, 3): 4})
    write_grids(tmp_path / "high.parquet", {(4, 4): 6, (2, 6): 8, (6, 2): 5})
    loader = load(tmp_path, scale=2)
    assert len(loader) == 6 + 4
    assert set(loader.grids) == {(4, 4), (2, 6)}
    seen = set()
    for number in range(20):
        for sample in loader.batch(number * 2, 2):
            assert sample.low is not None
            assert tuple(2 * side for side in sample.low.shape) == tuple(sample.codes.shape)
            assert int(sample.low[0, 0]) == int(sample.codes[0, 0]) == int(sample.caption.text.split()[1])
            seen.add((tuple(sample.codes.shape), int(sample.codes[0, 0])))
    assert len(seen) == 10
    with pytest.raises(DataError, match="codes at two grids, one 3 times the other"):
        load(tmp_path / "low.parquet", scale=3)
    assert load(tmp_path / "low.parquet").batch(0, 2)[0].low is None


def test_memory_is_that_of_the_codes_and_the_captions(tmp_path: Path) -> None:
    captions = tuple(
        Caption(text=f"caption {number:04d}", language="en", kind=kind)
        for number in range(3)
        for kind in ("name", "paraphrase")
    )
    items = [replace(coded(index, captions=captions), codes=np.zeros((8, 8), np.int32)) for index in range(2000)]
    write_codes(tmp_path / "a.parquet", items, tokenizer="t")
    tables, _ = read_tables([tmp_path], splits={"train"}, weights={("en", "name"): 1.0})
    table = tables[8, 8]
    held = table.codes.nbytes + table.starts.nbytes + table.labels.nbytes + table.texts.nbytes
    assert held <= 2000 * (2 * 64 + 8 + 3 * (12 + 6)) + 1000
