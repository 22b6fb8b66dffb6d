"""A picture set on disk: a folder of WebDataset shards that survives a kill at any moment.

    dataset.json        who wrote it with which settings, whether it is finished, its shards and counts
    shard-000000.tar    pictures and records; appears whole or not at all
    shard-000000.json   what of the source was consumed up to its end, counts, SHA-256
    quarantine.jsonl    a journal: one line per item that was refused, with the reason
    README.md           types of the columns, for `datasets`

A shard counts once its JSON is there. Whoever opens the folder again finds in `consumed` where to go on; what was
written behind the last shard that counts is thrown away and made again, so the bytes are those of a run that was
never stopped, as long as the writer is a function of its source. Knows nothing about sources.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mars.data.described_folder import read_description, refuse_other, to_disk, write_description
from mars.data.shards import INDEX, Picture, add_picture
from mars.errors import DataError
from mars.files import locked, place_for, reason

SHARD_PICTURES = 10_000
SHARD_BYTES = 1 << 28

_FIRST = {"README.md", f".{INDEX}.partial"}
"""What may lie in a folder that was stopped before its index was there."""
_README = """---
configs:
- config_name: default
  data_files: shard-*.tar
dataset_info:
  features:
  - name: png
    dtype: image
  - name: jpg
    dtype: image
  - name: webp
    dtype: image
  - name: json
    dtype: json
  - name: __key__
    dtype: string
  - name: __url__
    dtype: string
---
Pictures with captions in WebDataset shards, made by MARS. `dataset.json` says how.
"""


class ShardFolder:
    """Writes pictures into the shards of a folder, and continues where a run that was stopped left off.

    >>> with ShardFolder(out, settings={"source": "..."}) as folder:
    ...     for number, picture in source(start=folder.consumed or 0):
    ...         folder.add(picture, consumed=number + 1)
    ...     folder.finish()

    Args:
        settings: what decides the bytes, as JSON; a folder that was made with others is refused.
        journals: names of files of JSON lines that are kept in step with the shards.
        max_pictures: in a shard.
        max_bytes: of its pictures; the picture that reaches it is the last of its shard.

    Raises:
        DataError: if the folder holds something else, was made with other settings, is damaged, is being written by
            another process, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        settings: Mapping[str, Any],
        journals: Sequence[str] = ("quarantine",),
        max_pictures: int = SHARD_PICTURES,
        max_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path = place_for(path, error=DataError, may_replace=_may_continue)
        limits = {"shard_pictures": max_pictures, "shard_bytes": max_bytes}
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, **limits}))
        self._limits = max_pictures, max_bytes
        self.finished = False
        self.consumed: Any = None
        """What of the source lies in the shards that count, in the words of who added it; None at the start."""
        self.shards: list[str] = []
        self.pictures = 0
        """In the shards that count."""
        self.lines = dict.fromkeys(journals, 0)
        """Of each journal."""
        self._tar: tarfile.TarFile | None = None
        self._in_shard = self._bytes_in_shard = 0
        self._last_consumed: Any = None
        self._journals: dict[str, BinaryIO] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        try:
            with self._writing():
                self._held.enter_context(locked(self.path, error=DataError))
                self._held.callback(self._discard)
                self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError, ValueError):  # what was not written is not counted, whatever closing says
            if self._tar is not None:
                self._tar.close()
        for file in self._journals.values():
            with suppress(OSError):
                file.close()
        self._held.close()
        self._tar, self._journals = None, {}

    def add(self, picture: Picture, *, consumed: Any) -> None:
        """Adds a picture; `consumed` is where a run that is stopped right behind it has to go on, as JSON."""
        with self._writing():
            if self._tar is None:
                self._tar = tarfile.open(self._partial(), "w")  # noqa: SIM115 - closed with its shard
                self._in_shard = self._bytes_in_shard = 0
            add_picture(self._tar, picture)
            self._in_shard += 1
            self._bytes_in_shard += len(picture.content)
            self._last_consumed = consumed
            if self._in_shard >= self._limits[0] or self._bytes_in_shard >= self._limits[1]:
                self._close_shard()

    def note(self, journal: str, entry: Mapping[str, Any]) -> None:
        """Adds a line to a journal."""
        with self._writing():
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            self._journals[journal].write(line.encode("utf-8", "backslashreplace"))
            self.lines[journal] += 1

    def finish(self) -> None:
        """Closes the last shard and says that the folder is finished."""
        with self._writing():
            if self._tar is not None:
                self._close_shard()
            for file in self._journals.values():
                to_disk(file)
            self.finished = True
            self._write_index()

    def _partial(self) -> Path:
        return self.path / f".shard-{len(self.shards):06d}.tar.partial"

    def _discard(self) -> None:
        with suppress(OSError):
            self._partial().unlink()

    def _open(self) -> None:
        """Reads what is there, and throws away what does not count."""
        if (self.path / INDEX).is_file():
            known = read_description(self.path / INDEX)
            refuse_other(self.path, made=known["settings"], asked=self.settings)
        else:
            (self.path / "README.md").write_text(_README, "utf-8")
            self._write_index()
            known = {"finished": False}
        sizes = dict.fromkeys(self.lines, 0)
        while (described := self.path / f"shard-{len(self.shards):06d}.json").is_file():
            shard, name = read_description(described), f"{described.stem}.tar"
            with suppress(OSError):
                if (self.path / name).stat().st_size == shard["bytes"]:
                    self.shards.append(name)
                    self.pictures += shard["pictures"]
                    self.consumed, self.lines, sizes = shard["consumed"], shard["lines"], shard["journal_bytes"]
                    continue
            raise DataError(f"{self.path / name} is missing or was changed; remove {self.path} and make it again")
        self._check_journals(sizes, lines=known["lines"] if known["finished"] else {})
        if known["finished"]:
            self.finished, self.lines = True, known["lines"]
            return
        for path in self.path.glob("*shard-*"):
            if f"{path.stem}.tar" not in self.shards:
                path.unlink()
        for name, size in sizes.items():
            file = self._journals[name] = (self.path / f"{name}.jsonl").open("ab")
            file.truncate(size)

    def _check_journals(self, sizes: Mapping[str, int], *, lines: Mapping[str, int]) -> None:
        """What a journal has lost cannot be made again from shards; one without a line is made where it is gone."""
        for name, size in sizes.items():
            path = self.path / f"{name}.jsonl"
            if not path.is_file() and not (size or lines.get(name)):
                path.touch()
            if path.is_file() and path.stat().st_size >= size:
                with path.open("rb") as file:
                    if name not in lines or sum(1 for _ in file) >= lines[name]:
                        continue
            raise DataError(f"{path} is missing or was cut; put it back, or remove {self.path} and make it again")

    def _close_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        partial, name = self._partial(), f"shard-{len(self.shards):06d}.tar"
        with partial.open("rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            os.fsync(file.fileno())
        os.replace(partial, self.path / name)
        sizes = {journal: to_disk(file) for journal, file in self._journals.items()}
        described = {
            "pictures": self._in_shard,
            "bytes": size,
            "sha256": digest,
            "consumed": self._last_consumed,
            "lines": self.lines,
            "journal_bytes": sizes,
        }
        write_description((self.path / name).with_suffix(".json"), described)
        self.shards.append(name)
        self.pictures += self._in_shard
        self.consumed = self._last_consumed

    def _write_index(self) -> None:
        index = {
            "finished": self.finished,
            "pictures": self.pictures,
            "lines": self.lines,
            "shards": self.shards,
            "settings": self.settings,
        }
        write_description(self.path / INDEX, index)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write {self.path}: {reason(error)}; {self.pictures:,} pictures lie in whole shards, "
                "and the same command continues behind them"
            ) from error


def _may_continue(folder: Path) -> bool:
    """Whether a folder is one of shards, or of one that was stopped before it said so."""
    return (folder / INDEX).is_file() or all(path.name in _FIRST for path in folder.iterdir())
