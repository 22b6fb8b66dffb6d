"""What a batch is trained on.

Letters: B batch, T positions, D the LLM's width.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mars.model.cache import Cache, Prefix
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.layout import IGNORE, drawn_image, read_image, written_text

ROWS, WIDTH = 32, 4
"""Captions are read `ROWS` at a time and padded to a multiple of `WIDTH` ids."""


class PrefixStore:
    """Keys and values of captions: while nothing visual is in the cache, they depend on nothing that is trained.

    Args:
        gib: memory to use; those not asked for the longest are forgotten first.
    """

    def __init__(self, transformer: MarsTransformer, *, gib: float) -> None:
        self.transformer = transformer
        self.limit = int(gib * 2**30)
        self.held = 0
        self.prefixes: dict[tuple[int, ...], Prefix] = {}

    @torch.no_grad()
    def get(self, rows: Sequence[Sequence[int]], *, ahead: Iterable[Sequence[int]] = ()) -> list[Prefix]:
        """The prefix of each row of ids; those not held are computed together.

        Args:
            ahead: rows that will be asked for soon. Read along when something must be read at all, as far as they fit
                into half of the memory: many captions of one length cost less than few of many lengths.
        """
        keys = [tuple(row) for row in rows]
        found = {key: self.prefixes[key] for key in keys if key in self.prefixes}
        missing = {key for key in keys if key not in found}
        if missing:
            found |= self._read_all(missing | self._soon(ahead))
        for key in found:
            if key in self.prefixes:
                del self.prefixes[key]
            else:
                self.held += _bytes(found[key])
            self.prefixes[key] = found[key]
        while self.held > self.limit and self.prefixes:
            self.held -= _bytes(self.prefixes.pop(next(iter(self.prefixes))))
        return [found[key] for key in keys]

    def _soon(self, ahead: Iterable[Sequence[int]]) -> set[tuple[int, ...]]:
        """Rows to read along."""
        shapes = self.transformer.config
        width = 2 * shapes.language.num_kv_heads * shapes.language.head_width * len(shapes.visual_layers)
        soon: set[tuple[int, ...]] = set()
        room = self.limit // 2
        for row in ahead:
            key = tuple(row)
            room -= 4 * len(row) * width
            if room < 0:
                break
            if key not in self.prefixes:
                soon.add(key)
        return soon

    def _read_all(self, rows: set[tuple[int, ...]]) -> dict[tuple[int, ...], Prefix]:
        found: dict[tuple[int, ...], Prefix] = {}
        for _, group in groupby(sorted(rows, key=lambda row: (len(row), row)), key=_padded):
            rest = list(group)
            for start in range(0, len(rest), ROWS):
                found |= self._read(rest[start : start + ROWS])
        return found

    def _read(self, rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], Prefix]:
        """Prefixes of rows of one padded length.

        Filled up to one shape, because a product of another shape may round differently: a caption's prefix then is
        the same to the bit whatever is read beside it, so that a resumed run sees what the first one saw.
        """
        filler = [(0,) * _padded(rows[0])] * (ROWS + 1 - len(rows))
        return dict(zip(rows, read_prefixes(self.transformer, [*rows, *filler]), strict=False))


def _padded(row: Sequence[int]) -> int:
    return -(-len(row) // WIDTH) * WIDTH


def _bytes(prefix: Prefix) -> int:
    return (prefix.keys.numel() + prefix.values.numel() + prefix.last_hidden.numel()) * prefix.keys.element_size()


class Neighbours:
    """Codes that look alike, and how much each counts when one of them is the target (ours).

    A codebook of thousands holds many codes that a decoder draws alike (on mars-mini's, replacing every code by its
    16th nearest leaves 27 dB); which of them an encoder chose is noise that a small model need not learn.

    Args:
        codebook_VZ: the image tokenizer's.
        count: codes that share a target, the target itself among them.
        spread: squared distance at which a share falls to 1 / e, as a multiple of the median one of nearest codes.
    """

    def __init__(self, codebook_VZ: Tensor, *, count: int, spread: float) -> None:
        square_VV = torch.cdist(codebook_VZ, codebook_VZ).square()
        nearest = square_VV.topk(min(count, len(codebook_VZ)), largest=False)
        unit = nearest.values[:, 1].median() if count > 1 else square_VV.new_ones(())
        self.codes_VK = nearest.indices
        self.shares_VK = (-nearest.values / (spread * unit)).softmax(dim=1)

    def loss(self, logits_NV: Tensor, codes_N: Tensor) -> Tensor:
        """Mean cross-entropy of soft targets, in nats per code."""
        chosen_NK = logits_NV.gather(1, self.codes_VK[codes_N])
        return (logits_NV.logsumexp(dim=1) - (chosen_NK * self.shares_VK[codes_N]).sum(dim=1)).mean()


def text_to_image_loss(
    transformer: MarsTransformer,
    codes_BRC: Tensor,
    prefixes: Sequence[Prefix],
    *,
    neighbours: Neighbours | None = None,
) -> Tensor:
    """Mean cross-entropy of the codes after their captions, in nats per code; of soft targets with `neighbours`."""
    cache: Cache = transformer.new_cache()
    cache.load(prefixes)
    segment = drawn_image(codes_BRC, transformer.vocabulary)
    assert segment.targets is not None
    logits = transformer.visual_logits(transformer(segment, cache)).float()
    targets = segment.targets - transformer.vocabulary.first_code
    if neighbours is not None:
        return neighbours.loss(logits.flatten(0, 1), targets.flatten())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def begin_image_loss(transformer: MarsTransformer, prefixes: Sequence[Prefix]) -> Tensor:
    """Mean cross-entropy of `<img>` after a whole caption, among text and special ids: when to draw."""
    hidden_BD = torch.stack([prefix.last_hidden for prefix in prefixes])
    with torch.no_grad():
        text_B = torch.logsumexp(transformer.text_logits(hidden_BD).float(), dim=1)
    special = transformer.special_logits(hidden_BD).float()
    everything_B = torch.logsumexp(torch.cat([text_B[:, None], special], dim=1), dim=1)
    return (everything_B - special[:, 0]).mean()


def captioning_loss(
    transformer: MarsTransformer,
    codes_BRC: Tensor,
    captions: Sequence[Sequence[int]],
    *,
    hints: Sequence[Sequence[int]],
    end: int,
) -> Tensor:
    """Mean cross-entropy of the captions after their images, in nats per text id; gradients pass the frozen layers."""
    cache: Cache = transformer.new_cache()
    transformer(read_image(codes_BRC, transformer.vocabulary), cache)
    segment = written_text(captions, transformer.vocabulary, hints=hints, end=end)
    assert segment.targets is not None
    hidden_BTD = transformer(segment, cache)
    kept = segment.targets != IGNORE
    return F.cross_entropy(transformer.text_logits(hidden_BTD[kept]).float(), segment.targets[kept])
