"""Codes and captions of many pictures in flat arrays, read from code shards.

A picture takes 2 bytes per code and 8 more, each caption its UTF-8 and 6 more: a million pictures of 16x16 codes with
four captions of 60 bytes are about 0.8 GB. Captions that are never chosen are not kept.

Letters: N pictures, R rows, C columns.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mars.data.shards import INDEX, Caption
from mars.errors import DataError

Grid = tuple[int, int]
"""Rows and columns of codes."""
Weights = Mapping[tuple[str, str], float]
"""How often captions of a language and a kind are chosen, relative."""
COLUMNS = ("key", "split", "captions", "rows", "columns", "codes")


@dataclass(frozen=True, kw_only=True)
class CodeTable:
    """Pictures of one grid."""

    codes: npt.NDArray[np.int16]
    """(N, R, C)."""
    starts: npt.NDArray[np.int64]
    """(N + 1,): picture i has the captions `starts[i]` .. `starts[i + 1]`, at least one."""
    texts: Any
    """Arrow's chunked array of all captions; one becomes a Python string when it is asked for."""
    labels: npt.NDArray[np.int16]
    """Of each caption: the number of its language and kind in `weights`."""
    weights: Weights
    keys: Any
    """Arrow's chunked array of the pictures' keys, where they were asked for."""
    low: npt.NDArray[np.int16] | None = None
    """(N, R / scale, C / scale): the same pictures, smaller."""

    def __len__(self) -> int:
        return len(self.codes)

    def choose_caption(self, picture: int, generator: np.random.Generator) -> Caption:
        """One of a picture's captions, by their weights."""
        first, end = self.starts[picture], self.starts[picture + 1]
        pairs = list(self.weights.items())
        weights = np.array([pairs[label][1] for label in self.labels[first:end]])
        number = first + generator.choice(end - first, p=weights / weights.sum())
        language, kind = pairs[self.labels[number]][0]
        return Caption(text=self.texts[int(number)].as_py(), language=language, kind=kind)


def shard_files(paths: Sequence[Path]) -> list[Path]:
    """Code shards: files as they are, and every Parquet file below a folder, by name.

    Raises:
        DataError: if nothing is there, or the folder of `mars data encode` is not finished.
    """
    files: list[Path] = []
    for path in paths:
        for folder in (path, path.parent):  # of all sizes, or of one
            index = folder / INDEX
            if index.is_file() and not json.loads(index.read_text("utf-8")).get("finished"):
                raise DataError(f"{folder} is not finished; run `mars data encode` again, and it continues")
        found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        found = [one for one in found if not one.name.startswith(".")]
        if not found or not found[0].is_file():
            raise DataError(f"no code shard at {path}; make it with `mars data encode`")
        files += found
    return files


def read_tables(
    paths: Sequence[Path], *, splits: Collection[str], weights: Weights, scale: int | None = None
) -> tuple[dict[Grid, CodeTable], str]:
    """Reads code shards: a table per grid, and the digest of the image tokenizer that made the codes.

    Args:
        paths: files, or folders of them.
        splits: pictures of other splits are left out, and so are those without a caption of a weight above 0.
        scale: keeps the pictures that have codes at a grid and at one `scale` times smaller; null keeps all.

    Raises:
        DataError: if a file is missing, is no code shard, or comes from another image tokenizer than the others.
    """
    weights = {pair: weight for pair, weight in weights.items() if weight > 0}
    parts: dict[Grid, list[tuple[Any, ...]]] = {}
    digests = set()
    for path in shard_files(paths):
        digests.add(_read_file(path, parts, splits=splits, weights=weights, keyed=scale is not None))
    if len(digests) > 1:
        raise DataError(f"code shards must come from one image tokenizer, got {len(digests)}: encode them again")
    tables = {grid: _joined(parts.pop(grid), weights) for grid in sorted(parts)}
    return (tables if scale is None else _paired(tables, scale)), digests.pop()


def _read_file(
    path: Path, parts: dict[Grid, list[tuple[Any, ...]]], *, splits: Collection[str], weights: Weights, keyed: bool
) -> str:
    """Adds the pictures of a file to the `parts` of their grids; returns the digest of its image tokenizer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            digest: str = (file.schema_arrow.metadata or {})[b"image_tokenizer"].decode()
            for batch in file.iter_batches(columns=list(COLUMNS if keyed else COLUMNS[1:])):
                for grid, part in _parts(batch, splits=splits, weights=weights):
                    parts.setdefault(grid, []).append(part)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a code shard ({error}); make it with `mars data encode`") from error
    return digest


def _parts(batch: Any, *, splits: Collection[str], weights: Weights) -> Iterator[tuple[Grid, tuple[Any, ...]]]:
    """Codes, numbers of captions, texts, labels and keys of the pictures to keep, for each grid of a batch of rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    captions = batch["captions"].cast(_captions_type())
    flat = captions.flatten()
    labels = np.full(len(flat), -1, dtype=np.int16)
    language, kind = flat.field("language"), flat.field("kind")
    for number, pair in enumerate(weights):
        found = pc.and_(pc.equal(language, pair[0]), pc.equal(kind, pair[1]))
        labels[found.to_numpy(zero_copy_only=False)] = number
    owners = np.repeat(np.arange(len(batch)), pc.list_value_length(captions).to_numpy(zero_copy_only=False))
    counts = np.bincount(owners[labels >= 0], minlength=len(batch))
    wanted = pc.is_in(batch["split"], value_set=pa.array(list(splits))).to_numpy(zero_copy_only=False) & (counts > 0)
    shapes = np.stack([batch["rows"].to_numpy(), batch["columns"].to_numpy()], axis=1)
    for rows, columns in np.unique(shapes[wanted], axis=0).tolist():
        chosen = wanted & (shapes == (rows, columns)).all(axis=1)
        some = batch.filter(pa.array(chosen))
        codes = some["codes"].flatten().to_numpy().astype(np.int16, copy=True).reshape(len(some), rows, columns)
        kept = chosen[owners] & (labels >= 0)
        texts = flat.field("text").filter(pa.array(kept))
        keys = some["key"] if "key" in batch.schema.names else None
        yield (rows, columns), (codes, counts[chosen], texts, labels[kept], keys)


def _captions_type() -> Any:
    import pyarrow as pa

    return pa.list_(pa.struct([(name, pa.string()) for name in ("text", "language", "kind")]))


def _joined(parts: list[tuple[Any, ...]], weights: Weights) -> CodeTable:
    import pyarrow as pa

    codes, counts, texts, labels, keys = zip(*parts, strict=True)
    starts = np.concatenate([[0], np.concatenate(counts).cumsum()])
    return CodeTable(
        codes=np.concatenate(codes),
        starts=starts.astype(np.int64),
        texts=pa.chunked_array(texts),
        labels=np.concatenate(labels),
        weights=weights,
        keys=None if keys[0] is None else pa.chunked_array(keys),
    )


def _paired(tables: dict[Grid, CodeTable], scale: int) -> dict[Grid, CodeTable]:
    """Pictures that are also there `scale` times smaller, with those codes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paired = {}
    for (rows, columns), table in tables.items():
        small = tables.get((rows // scale, columns // scale))
        if small is None or rows % scale or columns % scale:
            continue
        found = pc.index_in(table.keys, value_set=small.keys)
        both = found.is_valid().to_numpy()
        if not both.any():
            continue
        counts = np.diff(table.starts)
        kept = np.repeat(both, counts)
        paired[rows, columns] = CodeTable(
            codes=table.codes[both],
            starts=np.concatenate([[0], counts[both].cumsum()]).astype(np.int64),
            texts=table.texts.filter(pa.array(kept)),
            labels=table.labels[kept],
            weights=table.weights,
            keys=None,
            low=small.codes[found.drop_null().to_numpy()],
        )
    return paired
