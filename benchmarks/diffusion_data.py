"""What the diffusion baseline is trained on: latents of the pictures, and states of the captions, each computed once.

    pictures -> image tokenizer, up to the vectors before quantization -> RUN/latents.safetensors
    captions -> the frozen LLM's last hidden states                     -> RUN/text/part-000000.safetensors, ...

Which picture comes with which caption, and when, the loader of our own training says (`data/loader.py`).

Letters: N pictures, Z code width, R rows, C columns, B batch, T positions, D the LLM's width.
"""

import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mars.checkpoint import read_tensors, save_tensors
from mars.data.code_table import shard_files
from mars.data.crops import Sizes
from mars.data.ingestion.decoding import stored_form
from mars.data.shards import CodedPicture, Picture, read_codes, read_pictures
from mars.errors import DataError
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import text_segment
from mars.sequence.text import TextTokenizer
from mars.training.process import has_fast_bf16

BATCH = 32
AGREE = 0.98
"""Least share of the codes that the latents must give again; rounding changes a few."""
WIDTH = 8
"""Captions are padded to a multiple of so many positions, so that steps have few shapes."""


def autocast() -> torch.autocast:
    """Products in bf16 where this CPU has units for them, as in our own training."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16(torch.device("cpu")))


def trained_pictures(
    shards: Sequence[Path], *, kinds: Mapping[str, float], languages: Mapping[str, float]
) -> list[CodedPicture]:
    """The pictures that a loader draws from, in its order: picture number i is `Sample.picture` i."""
    coded = [one for path in shard_files(shards) for one in read_codes(path)[0]]
    return [
        one
        for one in coded
        if one.record.split == "train"
        and any(kinds.get(text.kind, 0) * languages.get(text.language, 0) > 0 for text in one.record.captions)
    ]


@torch.inference_mode()
def make_latents(
    wanted: Sequence[CodedPicture], pictures: Sequence[Path], *, image_tokenizer: ImageTokenizer, sizes: Sizes
) -> Tensor:
    """Latents (N, Z, R, C) fp16 of the wanted pictures, found by their keys in picture shards.

    Raises:
        DataError: if a picture is missing, or is not the one that was encoded (other pixels, or another size).
    """
    places: dict[str, list[int]] = {}  # a shard may be listed more than once
    for place, coded in enumerate(wanted):
        places.setdefault(coded.record.key, []).append(place)
    rows, columns = wanted[0].codes.shape
    latents = torch.zeros(len(wanted), image_tokenizer.config.code_width, rows, columns, dtype=torch.float16)
    missing, right = set(places), 0
    for some in _batches(one for path in pictures for one in read_pictures(path) if one.record.key in places):
        images = torch.stack([_image(one, sizes) for one in some])
        vectors_BZRC = image_tokenizer.to_vectors(images)
        codes_N = image_tokenizer.quantizer.encode(vectors_BZRC.permute(0, 2, 3, 1).flatten(0, 2))
        codes_BRC = codes_N.view(len(some), rows, columns).numpy()
        for one, vectors_ZRC, codes_RC in zip(some, vectors_BZRC, codes_BRC, strict=True):
            own = places[one.record.key]
            latents[own] = vectors_ZRC.half()
            right += len(own) * int((codes_RC == wanted[own[0]].codes).sum())
            missing.discard(one.record.key)
    if missing:
        raise DataError(f"{len(missing)} pictures of the code shards are in none of the picture shards: {min(missing)}")
    share = right / (len(wanted) * rows * columns)
    if share < AGREE:
        raise DataError(
            f"picture shards must hold what the code shards were made from, but {share:.0%} of the codes agree; "
            "name the same pictures, size and image tokenizer"
        )
    return latents


def _batches(pictures: Iterable[Picture]) -> Iterable[list[Picture]]:
    some: list[Picture] = []
    for one in pictures:
        some.append(one)
        if len(some) == BATCH:
            yield some
            some = []
    if some:
        yield some


def _image(picture: Picture, sizes: Sizes) -> Tensor:
    """(3, height, width) in 0..1, made as `mars data encode` makes it."""
    image = Image.open(io.BytesIO(stored_form(picture.content).content)).convert("RGB")
    (found,) = sizes.images(image, key=picture.record.key)
    return torch.from_numpy(np.array(found)).permute(2, 0, 1).float() / 255


def caption_ids(texts: Iterable[str], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids as our own training has them, the beginning-of-text id first; it alone is the empty caption."""
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


@torch.no_grad()
def read_states(transformer: MarsTransformer, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The LLM's last hidden states (T, D) of each row of ids, after its last norm."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        with autocast():
            hidden_BTD = transformer(text_segment([rows[place] for place in some]), transformer.new_cache())
        for place, hidden_TD in zip(some, hidden_BTD, strict=True):
            found[place] = hidden_TD[: len(rows[place])].float()
    return [found[place] for place in range(len(rows))]


def padded(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States (T, D) of several lengths as (B, T, D), and which positions are real, (B, T)."""
    lengths = torch.tensor([len(one) for one in states])
    longest = -(-int(lengths.max()) // WIDTH) * WIDTH
    states_BTD = pad_sequence([*states, states[0].new_zeros(longest, states[0].shape[1])], batch_first=True)[:-1]
    return states_BTD, torch.arange(longest) < lengths[:, None]


class TextStates:
    """States of captions, kept on disk in parts that are mapped into memory; each caption is read once.

    Args:
        folder: where the parts are; those of an earlier run are found again.
    """

    def __init__(self, folder: Path, *, transformer: MarsTransformer, tokenizer: TextTokenizer) -> None:
        self.folder = folder
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.states: dict[str, Tensor] = {}
        """(T, D) fp16, by caption."""
        self.parts = 0
        for path in sorted(folder.glob("part-*.safetensors")):
            self._open(path)

    def read(self, texts: Collection[str]) -> int:
        """Reads those that were never read, as a new part; returns how many there were."""
        missing = sorted({text for text in texts if text not in self.states})
        if not missing:
            return 0
        states = read_states(self.transformer, caption_ids(missing, self.tokenizer))
        path = self.folder / f"part-{self.parts:06d}.safetensors"
        tensors = {"states": torch.cat(states).half(), "lengths": torch.tensor([len(one) for one in states])}
        words = np.frombuffer(json.dumps(missing, ensure_ascii=False).encode(), dtype=np.uint8)
        save_tensors(path, {**tensors, "texts": torch.from_numpy(words.copy())})
        self._open(path)
        return len(missing)

    def _open(self, path: Path) -> None:
        found = read_tensors(path)
        texts = json.loads(found["texts"].numpy().tobytes())
        self.states |= zip(texts, found["states"].split(found["lengths"].tolist()), strict=True)
        self.parts += 1

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (D,) over all positions that were read."""
        states_ND = torch.cat(list(self.states.values())).float()
        return states_ND.mean(dim=0), states_ND.std(dim=0).clamp(min=1e-3)
