"""What positions leave behind for later ones: keys, values, and which of them are real.

Layers without a visual expert are skipped by image positions, so they hold the keys of text only. There are therefore
two tracks of columns, `all` and `text`; a layer reads one of them.

    track all    | text text text pad | <img> c0 c1 ...
    track text   | text text text pad |

A query sees every real column before its block and its whole block; a block is one position, but for super-resolution.
Columns stand in the order of drawing. With blocks of K = 4:

    track all    | text text pad | <low> l0 l1 ... | <img> <img> <img> <img> | c0 c1 c2 c3 | c4 ...

Letters: B batch, T new positions, S columns so far, G key/value heads, E head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mars.errors import RequestError
from mars.sequence.layout import Modality, Segment

if TYPE_CHECKING:
    from mars.model.decoding import Decoder


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values of what one row has read, at the layers that image positions look at, without padding."""

    keys: Tensor
    """(visual layers, G, T, E)."""
    values: Tensor
    last_hidden: Tensor
    """(D,) final hidden state of the last position."""


class Cache:
    """A cache that grows by concatenation, so that gradients flow through it: for training."""

    def __init__(self, *, num_layers: int, visual_layers: Sequence[int]) -> None:
        self.visual_layers = tuple(visual_layers)
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.masks: dict[bool, Tensor | None] = {True: None, False: None}
        """Real columns (B, S) of the tracks `all` (true) and `text` (false)."""
        self.padded = {True: False, False: False}
        self.lengths_B: Tensor | None = None
        self.longest = 0
        """At least as many positions as any row has."""

    def begin(self, segment: Segment) -> Tensor:
        """Makes room for a segment; returns positions (B, T) of its ids in the joint sequence."""
        ids = segment.ids if segment.ids.dim() == 2 else segment.ids[..., 0]
        assert ids.shape[1] % segment.block == 0, "a segment holds whole blocks"
        real = segment.mask if segment.mask is not None else torch.ones_like(ids, dtype=torch.bool)
        lengths_B = self.lengths_B if self.lengths_B is not None else ids.new_zeros(len(ids))
        counts_BT = real.cumsum(dim=1)
        positions_BT = lengths_B[:, None] + (counts_BT - 1).clamp(min=0)
        if segment.side > 1:  # a code has the position of its raster place, whatever the order of drawing
            rows, columns = segment.places()
            positions_BT = lengths_B[:, None] - segment.start + rows * segment.columns + columns
        self.lengths_B = lengths_B + counts_BT[:, -1]
        self.longest += ids.shape[1]
        for track in self._tracks(segment):
            self._add(real, segment, track=track)
        return positions_BT

    def sight(self, segment: Segment) -> dict[bool, Tensor | None]:
        """What the segment that was begun sees.

        Returns:
            for each track the attention mask of its queries over all columns, or null where every query sees every
            column.
        """
        return {track: self._query_mask(segment, track=track) for track in self._tracks(segment)}

    @staticmethod
    def _tracks(segment: Segment) -> tuple[bool, ...]:
        return (True, False) if segment.modality is Modality.TEXT else (True,)

    def _add(self, real: Tensor, segment: Segment, *, track: bool) -> None:
        before = self.masks[track]
        self.masks[track] = real if before is None else torch.cat([before, real], dim=1)
        self.padded[track] |= segment.mask is not None

    def _query_mask(self, segment: Segment, *, track: bool) -> Tensor | None:
        """Of queries (B, 1, new, S), or null: each sees what came before its block, and the whole of that."""
        columns_BS, new, block = self.masks[track], segment.ids.shape[1], segment.block
        assert columns_BS is not None
        if new == block and not self.padded[track]:
            return None
        size = columns_BS.shape[1]
        column = torch.arange(size, device=columns_BS.device)
        ends = (torch.arange(new, device=columns_BS.device) // block + 1) * block + size - new
        return (column < ends[:, None]) & columns_BS[:, None, None, :]

    def extend(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of the segment that was begun; returns all columns of the layer, (B, G, S, E)."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is not None and values is not None:
            k_BGTE, v_BGTE = torch.cat([keys, k_BGTE], dim=2), torch.cat([values, v_BGTE], dim=2)
        self.keys[layer], self.values[layer] = k_BGTE, v_BGTE
        return k_BGTE, v_BGTE

    def prefixes(self, hidden_BTD: Tensor) -> list[Prefix]:
        """Splits a cache into its rows: one that holds a single text segment, or rows without padding.

        Args:
            hidden_BTD: final states of the last segment.
        """
        assert self.lengths_B is not None
        keys, values = (
            torch.stack([tensor for layer in self.visual_layers if (tensor := held[layer]) is not None], dim=1)
            for held in (self.keys, self.values)
        )
        before = keys.shape[3] - hidden_BTD.shape[1]
        return [
            Prefix(
                keys=keys[row, :, :, :length].clone(),
                values=values[row, :, :, :length].clone(),
                last_hidden=hidden_BTD[row, length - before - 1].clone(),
            )
            for row, length in enumerate(self.lengths_B.tolist())
        ]

    def load(self, prefixes: Sequence[Prefix]) -> None:
        """Fills an empty cache with the text of several rows, padded on the right. Only image segments may follow."""
        lengths = [prefix.keys.shape[2] for prefix in prefixes]
        longest = max(lengths)
        layers, groups, _, width = prefixes[0].keys.shape
        both = prefixes[0].keys.new_zeros(2, layers, len(prefixes), groups, longest, width)
        for row, prefix in enumerate(prefixes):
            both[0, :, row, :, : lengths[row]] = prefix.keys
            both[1, :, row, :, : lengths[row]] = prefix.values
        self.lengths_B = torch.tensor(lengths, device=both.device)
        mask = torch.arange(longest, device=both.device) < self.lengths_B[:, None]
        self.longest = longest
        for index, layer in enumerate(self.visual_layers):
            self.keys[layer], self.values[layer] = both[0, index], both[1, index]
        self.masks[True] = mask
        self.padded[True] = min(lengths) != longest


class LayerCache:
    """The keys and values of one layer alone."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys = keys
        self.values = values

    def extend(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """As `Cache.extend`."""
        if self.keys is not None and self.values is not None:
            k_BGTE, v_BGTE = torch.cat([self.keys, k_BGTE], dim=2), torch.cat([self.values, v_BGTE], dim=2)
        self.keys, self.values = k_BGTE, v_BGTE
        return k_BGTE, v_BGTE


class StaticCache(Cache):
    """A cache of fixed size, filled in place: for inference. It holds (layers, rows, G, size, E) keys and values.

    Each row has a length of its own and no padding, so that rows may stand at different places of their sequences, and
    come and go at any step:

        row 0   | text text text <img> c0 c1 c2         |
        row 1   | text <img>                            |
        row 2   |                                       |   free

    `layers` are those that will be used: a cache that only images extend needs no others than the visual ones.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        visual_layers: Sequence[int],
        layers: Sequence[int],
        batch: int,
        size: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_layers=num_layers, visual_layers=visual_layers)
        num_kv_heads, head_width = heads
        self.size = size
        self.places = {layer: place for place, layer in enumerate(layers)}
        """Where a layer lies in the store."""
        self.store = torch.zeros(2, len(layers), batch, num_kv_heads, size, head_width, dtype=dtype, device=device)
        self.texts_B: Tensor | None = None
        """Columns of each row in the track `text`; those in `all` are `lengths_B`."""
        self.columns: dict[bool, Tensor] = {}
        """Where the new positions of the segment that was begun lie in each track, (B, T)."""
        self.most = {True: 0, False: 0}
        """Columns of the longest row, or more."""
        self.ragged = {True: False, False: False}
        """Whether rows may differ in length."""
        self.new = 0
        self.decoder: Decoder | None = None
        """The kernel's way through the layers beside this cache, if there is one."""
        self.sought = False
        """Whether a step has looked for it."""

    @property
    def rows(self) -> int:
        """Rows in use, the first of the store."""
        return 0 if self.lengths_B is None else len(self.lengths_B)

    def _add(self, real: Tensor, segment: Segment, *, track: bool) -> None:
        assert self.lengths_B is not None
        self.new = real.shape[1]
        self.most[track] += self.new
        self._check_fits(self.most[track])
        counts_B = real.sum(dim=1)
        if not track:
            self.texts_B = counts_B if self.texts_B is None else self.texts_B + counts_B
        ends_B = self.lengths_B if track else self.texts_B
        assert ends_B is not None
        self.columns[track] = (ends_B - counts_B)[:, None] + torch.arange(self.new, device=real.device)
        self.ragged[track] |= segment.mask is not None

    def _query_mask(self, segment: Segment, *, track: bool) -> Tensor | None:
        """(B, 1, T, S) or null, as in every cache, out of where the new positions of each row lie."""
        block = segment.block
        if self.new == block and not self.ragged[track]:
            return None
        columns_BT = self.columns[track]
        blocks = torch.arange(self.new, device=columns_BT.device) // block + 1
        ends_BT = columns_BT[:, :1] + blocks * block
        return (torch.arange(self.most[track], device=columns_BT.device) < ends_BT[..., None])[:, None]

    def extend(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values in place; returns all columns of the layer, (B, G, S, E).

        They are a view, but for a store of another dtype. What a row has beyond its length is masked: padding that was
        written there, until the next segment overwrites it.
        """
        track, exact = layer in self.visual_layers, k_BGTE.dtype
        end, count = self.most[track], len(k_BGTE)
        k_BGTE, v_BGTE = self._kept(k_BGTE), self._kept(v_BGTE)
        keys, values = self.store[:, self.places[layer], :count]
        if self.ragged[track]:
            rows_B1 = torch.arange(count, device=keys.device)[:, None]
            keys[rows_B1, :, self.columns[track]] = k_BGTE.transpose(1, 2)
            values[rows_B1, :, self.columns[track]] = v_BGTE.transpose(1, 2)
        else:
            keys[:, :, end - self.new : end] = k_BGTE
            values[:, :, end - self.new : end] = v_BGTE
        return keys[:, :, :end].to(exact), values[:, :, :end].to(exact)

    def _kept(self, x: Tensor) -> Tensor:
        """As the store has it, with what is beyond the range of fp16 at its end."""
        if self.store.dtype is torch.float16 and x.dtype is not torch.float16:
            limits = torch.finfo(torch.float16)
            x = x.clamp(limits.min, limits.max)
        return x.to(self.store.dtype)

    def _check_fits(self, length: int) -> None:
        if length > self.size:
            raise RequestError(f"the sequence must fit into {self.size} positions, got {length}; ask for less")

    def load(self, prefixes: Sequence[Prefix]) -> None:
        """Adds a row for each prefix, behind the rows that there are. Only image segments may follow."""
        first, lengths = self.rows, [prefix.keys.shape[2] for prefix in prefixes]
        assert first + len(prefixes) <= self.store.shape[2], "a row of the cache must be free"
        self._check_fits(max(lengths))
        places = [self.places[layer] for layer in self.visual_layers]
        for row, prefix in enumerate(prefixes, first):
            self.store[0, places, row, :, : lengths[row - first]] = self._kept(prefix.keys)
            self.store[1, places, row, :, : lengths[row - first]] = self._kept(prefix.values)
        added = torch.tensor(lengths, device=self.store.device)
        self.lengths_B = added if self.lengths_B is None else torch.cat([self.lengths_B, added])
        self._measure()

    def prefix(self, row: int) -> Prefix:
        """What a row holds so far, for another cache; it has no last hidden state."""
        assert self.lengths_B is not None
        length, places = int(self.lengths_B[row]), [self.places[layer] for layer in self.visual_layers]
        keys, values = self.store[:, places, row, :, :length].clone()
        return Prefix(keys=keys, values=values, last_hidden=keys.new_empty(0))

    def forget(self, counts_B: Tensor) -> None:
        """Takes back the last columns of each row, as many as said."""
        assert self.lengths_B is not None
        self.lengths_B = self.lengths_B - counts_B
        self._measure()

    def remove(self, row: int) -> None:
        """Frees a row; the last one takes its place."""
        assert self.lengths_B is not None
        last = self.rows - 1
        if row != last:
            length = int(self.lengths_B[last])
            self.store[:, :, row, :, :length] = self.store[:, :, last, :, :length]
            self.lengths_B[row] = length
        self.lengths_B = self.lengths_B[:last]
        self._measure()

    def resize(self, *, batch: int, size: int) -> None:
        """Makes room for other numbers of rows and columns, at least those in use."""
        layers, (groups, width) = self.store.shape[1], self.store.shape[3::2]
        rows, longest = self.rows, self.most[True]
        store = self.store.new_zeros(2, layers, batch, groups, size, width)
        store[:, :, :rows, :, :longest] = self.store[:, :, :rows, :, :longest]
        self.store, self.size = store, size
        self.decoder, self.sought = None, False

    def _measure(self) -> None:
        """Looks at lengths again after rows have come or gone."""
        assert self.lengths_B is not None
        lengths = self.lengths_B.tolist() or [0]
        self.longest = self.most[True] = max(lengths)
        self.ragged[True] = min(lengths) != max(lengths)
