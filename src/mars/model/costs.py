"""What a transformer of given shapes costs: parameters, bytes, cache, and FLOPs, without any weights.

Everything is counted on the real modules, built on the meta device; no figure comes from a table of sizes.

FLOPs are those of the matrix products, two per multiply-add (Kaplan et al. 2020, section 2.1). Attention counts every
query with every column that it is multiplied with, masked ones too: 4 H E per pair and layer (Chowdhery et al. 2022,
PaLM, appendix B), which is what PyTorch's own counter counts. A backward pass costs twice the forward pass where
weights are trained, and once where frozen weights only pass gradients on. Norms, softmax, rotary positions,
element-wise functions, embeddings and the sampling of codes are not counted.

Letters: H query heads, E head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import ModelConfig
from mars.model.layers import Expert
from mars.model.quantized import BLOCK
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer, is_language
from mars.sequence.layout import Modality


def meta_transformer(config: ModelConfig) -> MarsTransformer:
    """A transformer without weights: every parameter has its shape and takes no memory."""
    with torch.device("meta"):
        return MarsTransformer(config)


def meta_image_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """An image tokenizer without weights."""
    with torch.device("meta"):
        return ImageTokenizer(config)


def part_of(name: str) -> str:
    """Which part of a MARS a transformer's parameter belongs to."""
    if is_language(name):
        return "language tables" if name.startswith(("language_embedding", "language_head")) else "language layers"
    return "visual layers" if ".visual." in name or name.startswith("visual_norm") else "visual tables"


def count_parameters(transformer: MarsTransformer) -> dict[str, int]:
    """Parameters of each part: layers of both experts with their norms, tables (embeddings and heads) of both."""
    counts = dict.fromkeys(("language layers", "language tables", "visual layers", "visual tables"), 0)
    for name, weight in transformer.named_parameters():
        counts[part_of(name)] += weight.numel()
    return counts


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How weights are kept.

    `bits` are those of a matrix of an expert or a head; with a `group`, each so many inputs of an output share a scale.
    Embedding tables, norms, biases and the image tokenizer keep `other_bytes` each.
    """

    bits: int
    other_bytes: int
    group: int | None = None
    scale_bytes: int = 2

    def size(self, weight: torch.Tensor, *, matrix: bool) -> int:
        """Bytes of a tensor; `matrix` where it is a matrix of an expert or a head."""
        if not matrix:
            return weight.numel() * self.other_bytes
        scales = 0
        if self.group is not None:
            outputs, inputs = weight.shape
            scales = outputs * -(-inputs // self.group)
        return weight.numel() * self.bits // 8 + scales * self.scale_bytes


STORAGES: Mapping[str, Storage] = {
    "fp32": Storage(bits=32, other_bytes=4),
    "bf16": Storage(bits=16, other_bytes=2),
    "int8": Storage(bits=8, other_bytes=2, group=BLOCK),
    "int4": Storage(bits=4, other_bytes=2, group=BLOCK),
}
"""int8 and int4 are those of `model.quantized`: an fp16 scale per 32 inputs, 8.5 and 4.5 bits a weight. Tables, norms
and the image tokenizer are counted at 16 bits beside them."""


def weight_bytes(transformer: MarsTransformer, image_tokenizer: ImageTokenizer, storage: Storage) -> dict[str, int]:
    """Bytes of the weights of each part, the image tokenizer's too, and two sums of them.

    `read per code` is what memory must deliver for one code, the cache and rows of tables apart: the visual layers
    (which all codes of a position share), the head for codes, and what the language expert shares with them. `kept
    after the prompt` is what is left when the language expert is dropped once the prompt is read.
    """
    names = ("language layers", "language tables", "visual layers", "visual tables", "image tokenizer")
    sizes = dict.fromkeys((*names, "kept after the prompt", "read per code"), 0)
    read, slots = _read_per_code(transformer), transformer.vocabulary.slots
    for name, weight in transformer.named_parameters():
        size = storage.size(weight, matrix=weight.dim() == 2 and _is_product(name))
        sizes[part_of(name)] += size
        sizes["read per code"] += size // (slots if "layers." in name else 1) if name in read else 0
        sizes["kept after the prompt"] += size if name in read or not is_language(name) else 0
    for weight in image_tokenizer.parameters():
        size = storage.size(weight, matrix=False)
        sizes["image tokenizer"] += size
        sizes["kept after the prompt"] += size
    return sizes


def _is_product(name: str) -> bool:
    """Whether a matrix is multiplied with; others are tables, of which rows are looked up."""
    return any(part in name for part in ("layers.", "_head.", "visual_cells.contexts.", "visual_cells.blocks."))


def _read_per_code(transformer: MarsTransformer) -> set[str]:
    shared: tuple[str, ...] = ("attention_norm.", "ffn_norm.", "q_norm.", "k_norm.")
    if not transformer.config.semvie.share_norms:
        shared = ()
    if not transformer.config.semvie.duplicate_output:
        shared = (*shared, "o_proj.")
    borrowed = tuple(f"layers.{n}.language.{part}" for n in transformer.config.visual_layers for part in shared)
    last = "language_norm." if transformer.config.semvie.share_norms else "visual_norm."
    return {
        name
        for name, _ in transformer.named_parameters()
        if ".visual." in name
        or name.startswith(("visual_head.", last, *borrowed))
        or (name.startswith("visual_cells.") and _is_product(name))
    }


def cache_bytes(transformer: MarsTransformer, *, itemsize: int) -> dict[str, int]:
    """Bytes of keys and values that a position takes in a row of the cache: when drawing, which uses the layers with a
    visual expert, and when writing text."""
    held = {"drawing": True, "writing text": False}
    return {
        name: transformer.new_static_cache(batch=1, size=1, images_only=images_only).store.numel() * itemsize
        for name, images_only in held.items()
    }


def _matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


class FlopCount:
    """FLOPs of a transformer's matrix products; see the module for what is counted.

    Positions, captions and codes are numbers of one row; a batch costs the sum of its rows, padded to the longest.
    """

    def __init__(self, transformer: MarsTransformer) -> None:
        language, experts = transformer.config.language, list[Expert]()
        self.text_linear = self.image_linear = 0
        """Of all layers, per position."""
        for layer in transformer.layers:
            assert isinstance(layer, SemVIELayer)
            self.text_linear += 2 * _matrices(layer.language)
            if layer.visual is not None:
                experts.append(layer.visual)
                shared = 0 if hasattr(layer.visual, "o_proj") else 2 * _matrices(layer.language.o_proj)
                self.image_linear += 2 * _matrices(layer.visual) + shared
        self.text_head = 2 * language.width * language.vocab_size
        self.slots = transformer.vocabulary.slots
        self.image_head = 2 * _matrices(transformer.visual_head)
        self.cell = 0
        """Of what stands between a position's state and the head, per code."""
        if self.slots > 1:
            cells = transformer.visual_cells
            self.cell = 2 * (_matrices(cells.contexts) // self.slots + _matrices(cells.blocks))
        self.low = 2 * _matrices(transformer.low_projection) if transformer.config.semvie.low_input else 0
        """Of what a position makes of the low-resolution code that it refines."""
        self.layers, self.visual_layers = language.num_layers, len(experts)
        self.pair = 4 * language.num_heads * language.head_width
        """Of one query and one column, in one layer."""
        self.key_value = 2 * (_matrices(experts[-1].k_proj) + _matrices(experts[-1].v_proj))
        """Of the keys and values of one visual layer, per position."""
        self.frozen = self.image_linear // self.visual_layers - 2 * _matrices(experts[-1])
        """Of the output projection of one visual layer, per position, where it is the language expert's."""

    def read_text(self, positions: int, *, image: int = 0) -> int:
        """Text run through the language expert, after so many image positions; no head."""
        columns = self.layers * positions + self.visual_layers * image
        return positions * (self.text_linear + self.pair * columns)

    def read_image(self, positions: int, *, before: int) -> int:
        """Image positions run at once through the visual expert, after so many others; no head."""
        return positions * (self.image_linear + self.pair * self.visual_layers * (before + positions))

    def draw(self, *, prompt: int, codes: int, guided: bool, low: int = 0, block: int = 1) -> int:
        """A picture drawn after a prompt, which is read.

        Args:
            guided: with guidance there is a second row, whose text is taken to be as long as the prompt; the head runs
                once for both.
            low: positions of a picture of lower resolution that is read first.
            block: codes of a step.
        """
        before, positions = prompt + low, codes // self.slots
        pairs = positions * before + positions * (positions + max(1, block // self.slots)) // 2
        row = self.read_text(prompt) + (self.read_image(low, before=prompt) + positions * self.low if low else 0)
        row += positions * self.image_linear + self.pair * self.visual_layers * pairs + codes * self.cell
        return row * (2 if guided else 1) + codes * self.image_head

    def train_text_to_image(self, *, caption: int, codes: int, low: int = 0) -> int:
        """One training sample: the caption is read without a graph, the codes are predicted.

        Args:
            low: positions of a picture of lower resolution between both (super-resolution).
        """
        positions = codes // self.slots
        flops = self.read_text(caption) + self._train_image(positions, before=caption + low, codes=codes)
        if low:
            flops += self._train_image(low, before=caption, codes=0) + 3 * positions * self.low
        return flops

    def train_captioning(self, *, caption: int, codes: int) -> int:
        """One training sample: `<img>` and the codes are read, `</img>` and the caption follow.

        Gradients pass through the frozen layers, whose weights take none.
        """
        positions, text = codes // self.slots + 1, caption + 1
        linear = text * (self.text_linear + self.text_head)
        attention = self.read_text(text, image=positions) - text * self.text_linear
        return self._train_image(positions, before=0, codes=0) + 2 * linear + 3 * attention

    def train_document(self, segments: Sequence[tuple[Modality, int, int]]) -> int:
        """One training sample of texts and images in any order: at most so much, since of a text that predicts nothing
        some products take no gradient.

        Args:
            segments: modality, positions, and how many of these predict a code or a text id.
        """
        flops = text = image = 0
        for modality, positions, predicted in segments:
            if modality is Modality.IMAGE:
                flops += self._train_image(positions, before=text + image, codes=predicted)
                image += positions
                continue
            linear = positions * self.text_linear
            attention = self.read_text(positions, image=image) - linear + positions * self.pair * self.layers * text
            flops += linear + attention  # the first is only read; gradients pass through the others
            if image:
                flops += linear + 2 * attention + 2 * predicted * self.text_head
            text += positions
        return flops

    def _train_image(self, positions: int, *, before: int, codes: int) -> int:
        """Image positions forward and backward, which predict so many codes. Those that predict none are heard through
        keys and values alone, so the last visual layer's other products take no gradient."""
        forward = self.read_image(positions, before=before)
        if codes:
            heads = codes * (self.image_head + self.cell)
            return 3 * (forward + heads) - positions * self.frozen * self.visual_layers
        unused = self.image_linear // self.visual_layers - self.key_value
        unused += self.pair * (before + positions)
        return 3 * forward - positions * (2 * unused + self.frozen * (self.visual_layers - 1))


@cache
def image_tokenizer_flops(config: ImageTokenizerConfig, *, grid: tuple[int, int]) -> tuple[int, int]:
    """FLOPs to encode and to decode a picture of `grid` (rows, columns) codes, counted by PyTorch on meta tensors."""
    tokenizer, (rows, columns) = meta_image_tokenizer(config), grid
    images = torch.empty(1, 3, rows * config.factor, columns * config.factor, device="meta")
    codes_BRC = torch.empty(1, rows, columns, dtype=torch.long, device="meta")
    counts = []
    for run, given in ((tokenizer.encode, images), (tokenizer.decode, codes_BRC)):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run(given)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]
