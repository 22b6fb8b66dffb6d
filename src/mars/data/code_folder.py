"""Codes of a whole picture set, in a folder that survives a kill at any moment.

    dataset.json                who wrote it with which settings, whether it is finished, and counts
    128/shard-000000.parquet    codes of the pictures of shard-000000.tar at 128 pixels; without sizes, not in a folder
    shard-000000.json           counts, refused pictures, SHA-256 of the picture shard and of the files
    quarantine.jsonl            when finished: one line per picture that was refused, with the reason

A shard counts once its JSON is there and its files are what it says; any other is made again, from its pictures
alone, so the bytes are those of a run that was never stopped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mars.data.described_folder import read_description, refuse_other, write_description
from mars.data.encode import BLOCK, PIXELS, Encoder, Outcome, blocks
from mars.data.picture_set import shard_digests
from mars.data.shards import INDEX, CodedPicture, Picture, read_pictures, write_codes
from mars.data.workers import WorkerDied, in_order
from mars.errors import DataError
from mars.files import file_digest, locked, place_for, whole_file

Report = Callable[[int, int | None], None]
"""Called with how many pictures are done, and how many there are where that is known."""


@dataclass(frozen=True, kw_only=True)
class EncodedSet:
    """How many pictures have codes, and how many have none."""

    pictures: int
    refused: int


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Writes the codes of a picture shard."""

    encoder: Encoder
    out: Path
    digests: Mapping[Path, str]
    """SHA-256 of each picture shard."""

    def write(self, shard: Path, encoded: Iterable[tuple[list[Picture], list[Outcome] | WorkerDied]]) -> None:
        """Writes the files of a shard from its blocks, its JSON last."""
        sizes = [str(size) for size in self.encoder.sizes.sizes] or ["."]
        coded: dict[str, list[CodedPicture]] = {size: [] for size in sizes}
        refused: list[dict[str, str]] = []
        total = 0
        for block, outcomes in encoded:
            total += len(block)
            if isinstance(outcomes, WorkerDied):
                outcomes = ["something in its block ended the process that encoded it, twice"] * len(block)
            for picture, outcome in zip(block, outcomes, strict=True):
                if isinstance(outcome, str):
                    refused.append({"source": shard.name, "key": picture.record.key, "reason": outcome})
                    continue
                for size, codes in zip(sizes, outcome, strict=True):
                    coded[size].append(CodedPicture(record=picture.record, codes=codes))
        files = {}
        for size, items in coded.items():
            if items:
                path = Path(size) / f"{shard.stem}.parquet"
                write_codes(self.out / path, items, tokenizer=self.encoder.digest)
                files[path.as_posix()] = _digest(self.out / path)
        found = {"pictures": total, "sha256": self.digests[shard], "files": files, "refused": refused}
        write_description(self.out / f"{shard.stem}.json", found)


Engine = Callable[[Sequence[Path], ShardWriter, Callable[[int], None]], None]
"""Encodes shards with a writer, and calls with how many more pictures are done."""


def local_engine(*, workers: int) -> Engine:
    """Blocks are encoded by processes of this machine, one thread each; one that dies is replaced."""

    def encode(shards: Sequence[Path], writer: ShardWriter, told: Callable[[int], None]) -> None:
        items = ((shard, block) for shard in shards for block in _at_least_one(blocks(read_pictures(shard))))
        results = in_order(partial(_encode_item, writer.encoder), items, workers=workers)
        for shard, of_shard in groupby(results, key=lambda result: result[0][0]):
            writer.write(shard, _counted(of_shard, told))

    return encode


def _at_least_one(found: Iterator[list[Picture]]) -> Iterator[list[Picture]]:
    """So that a shard without pictures is a shard too."""
    yield next(found, [])
    yield from found


def _encode_item(encoder: Encoder, item: tuple[Path, list[Picture]]) -> list[Outcome]:
    return encoder(item[1])


def _counted(
    results: Iterable[tuple[tuple[Path, list[Picture]], list[Outcome] | WorkerDied]], told: Callable[[int], None]
) -> Iterator[tuple[list[Picture], list[Outcome] | WorkerDied]]:
    for (_, block), outcomes in results:
        yield block, outcomes
        told(len(block))


def encode_folder(
    pictures: Path, *, encoder: Encoder, out: Path, engine: Engine, progress: Report | None = None
) -> EncodedSet:
    """Encodes a picture shard, or a folder of them, into a folder of code shards; continues one that was stopped.

    Raises:
        DataError: if pictures cannot be read, or none of them be encoded, or the folder holds something else, was made
            with other settings or from other shards, is being written by another process, or cannot be written.
    """
    pictures = pictures.absolute()  # a process of a cluster may begin in another folder
    digests = shard_digests(pictures)
    if not digests:
        raise DataError(f"{pictures} holds no pictures to encode; see what the command that made it dropped")
    shards = list(digests)
    out = place_for(out, error=DataError, may_replace=_may_continue)
    settings = {"image_tokenizer": encoder.digest, **asdict(encoder.sizes), "block": BLOCK, "pixels": PIXELS}
    index: dict[str, Any] = {"finished": False, "settings": json.loads(json.dumps(settings))}
    with locked(out, error=DataError):
        known = _known(out, digests=digests, settings=index["settings"])
        todo = [shard for shard in shards if shard not in known]
        done, total = sum(known.values()), _total(pictures)

        def told(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(done, total)

        if todo:
            write_description(out / INDEX, index)
            told(0)
            engine(todo, ShardWriter(encoder=encoder, out=out, digests=digests), told)
        refused = [entry for shard in digests for entry in read_description(out / f"{shard.stem}.json")["refused"]]
        with whole_file(out / "quarantine.jsonl", error=DataError) as partial_file:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused]
            partial_file.write_text("".join(lines), "utf-8")
        found = EncodedSet(pictures=done - len(refused), refused=len(refused))
        if not found.pictures:
            why = refused[0]["reason"] if refused else "there are none"
            raise DataError(f"none of {done:,} pictures of {pictures} can be encoded ({why}); {out} lists them")
        write_description(out / INDEX, {"finished": True, **asdict(found), "settings": index["settings"]})
    return found


def _may_continue(folder: Path) -> bool:
    return (folder / INDEX).is_file() or all(path.name.startswith(".") for path in folder.iterdir())


def _known(out: Path, *, digests: Mapping[Path, str], settings: dict[str, Any]) -> dict[Path, int]:
    """Shards whose codes are there, with how many pictures they have."""
    if not (out / INDEX).is_file():
        return {}
    refuse_other(out, made=read_description(out / INDEX)["settings"], asked=settings)
    there = {path.stem: path for path in out.glob("*.json") if path.name != INDEX}
    if strangers := sorted(there.keys() - {shard.stem for shard in digests}):
        raise DataError(f"{out} holds codes of other shards, such as {strangers[0]}; name another folder, or remove it")
    known = {}
    for shard, digest in digests.items():
        if shard.stem not in there:
            continue
        found = read_description(there[shard.stem])
        if found.get("sha256") != digest:
            raise DataError(f"{out} holds codes of another {shard.name}; name another folder, or remove it")
        if all(_digest(out / name) == made for name, made in found["files"].items()):  # else they are made again
            known[shard] = found["pictures"]
    return known


def _total(pictures: Path) -> int | None:
    """How many pictures a folder says it has."""
    return read_description(pictures / INDEX).get("pictures") if pictures.is_dir() else None


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, if it is there."""
    return file_digest(path) if path.is_file() else None
