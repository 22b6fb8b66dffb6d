"""The MARS transformer: run one segment through the stack, reading and extending a cache. Nothing else.

    for segment in sequence:
        hidden = transformer(segment, cache)     # picks .language or .visual in every layer, once per segment

Training, prompt prefill and decoding are the same code; only the cache differs.

Letters: B batch, T positions, D width of the segment's modality, V text vocabulary, K codes of a cell, E its width.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mars.errors import RequestError
from mars.model.cache import Cache, Prefix, StaticCache
from mars.model.cells import CellHead
from mars.model.compiled import CompiledSteps
from mars.model.config import ModelConfig
from mars.model.decoding import MOST_POSITIONS, Decoder, HalfWeights, build_decoder, kernel_for
from mars.model.layers import Linear, Norm
from mars.model.rope import Rotary
from mars.model.semvie import SemVIELayer
from mars.sequence.layout import Modality, Segment, text_segment
from mars.sequence.vocabulary import Vocabulary


def is_language(name: str) -> bool:
    """Whether a parameter belongs to the frozen language expert."""
    return name.startswith("language_") or ".language." in name


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding whose weights are not drawn, for the reason that `Linear.reset_parameters` gives."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class MarsTransformer(nn.Module):
    """A frozen LLM and its visual expert.

    Tables: `language_embedding` and `language_head` (absent when tied) are the LLM's; `visual_embedding` and
    `visual_head` hold a row per code, special and dead id; `special_embedding` and `special_head` are the special
    ids as text positions see them, in the LLM's width. Where positions hold cells of codes, `visual_embedding` has such
    rows for each place in a cell, and `visual_cells` stands between states and `visual_head`. `low_projection` (absent
    unless `semvie.low_input`) is what an image position makes of the low-resolution code that it refines.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether layers keep no activations for a backward pass, and compute them again there."""
        self.compiled = False
        self.steps: CompiledSteps | None = None
        """How steps of drawing are compiled, if they are."""
        self.halves: HalfWeights | None = None
        """Copies in 16 bits of the visual weights, for drawing; none where it shall read these themselves."""
        language, width = config.language, config.visual_width
        self.vocabulary = Vocabulary(text_size=language.vocab_size, num_codes=config.num_codes, cell=config.semvie.cell)
        self.rotary = Rotary(language.head_width, theta=language.rope_theta, scaling=language.rope_scaling)
        self.language_embedding = _table(language.vocab_size, language.width)
        self.layers = nn.ModuleList(SemVIELayer(config, index) for index in range(language.num_layers))
        self.language_norm = Norm(language.width, eps=language.norm_eps)
        if not language.tied_embeddings:
            self.language_head = Linear(language.width, language.vocab_size, bias=False)
        self.text_half: Tensor | None
        self.register_buffer("text_half", None, persistent=False)
        """A copy of the embedding in 16 bits, where that is also the head and training multiplies in so many."""
        specials = self.vocabulary.size - self.vocabulary.first_special
        self.special_embedding = _table(specials, language.width)
        self.special_head = Linear(language.width, specials, bias=False)
        slots, cell_width = self.vocabulary.slots, config.semvie.cell_width
        self.visual_embedding = _table(slots * self.vocabulary.visual_rows, width)
        if slots > 1:
            self.visual_cells = CellHead(
                width=width, cell_width=cell_width, slots=slots, num_codes=config.num_codes, eps=language.norm_eps
            )
        self.visual_head = Linear(width if slots == 1 else cell_width, self.vocabulary.visual_rows, bias=False)
        if not config.semvie.share_norms:
            self.visual_norm = Norm(width, eps=language.norm_eps)
        if config.semvie.grid_embedding:
            self.visual_grid = nn.ParameterDict(
                {side: torch.empty(config.semvie.max_grid + 1, width) for side in ("rows", "columns")}
            )
        if config.semvie.low_input:
            self.low_projection = Linear(width, width, bias=False)

    def forward(self, segment: Segment, cache: Cache) -> Tensor:
        """Runs a segment after what the cache holds; returns its final hidden states (B, T, D).

        Raises:
            RequestError: for text once the language expert has been released.
        """
        if self.released and segment.modality is Modality.TEXT:
            raise RequestError("the language expert was released after its prompt; open the model again")
        positions_BT = cache.begin(segment)
        x_BTD = self.embed(segment)
        if isinstance(cache, StaticCache):
            longest = cache.size
        else:  # and rows that a block has begun
            longest = cache.longest + (segment.side - 1) * int(segment.columns)
        rotary = self.rotary.at(positions_BT, longest=longest, dtype=x_BTD.dtype)
        if isinstance(cache, StaticCache) and (decoder := self._decoder(segment, cache)):
            return decoder.run(x_BTD, rotary, cache, block=segment.block, norm=self._final_norm(segment.modality))
        visual_layers, masks = set(cache.visual_layers), cache.sight(segment)
        for index, layer in enumerate(self.layers):
            if segment.modality is Modality.TEXT or index in visual_layers:
                mask = masks[index in visual_layers]
                x_BTD = self._run(layer, x_BTD, segment.modality, cache=cache, rotary=rotary, mask=mask)
        return cast(Tensor, self._final_norm(segment.modality)(x_BTD))

    def _final_norm(self, modality: Modality) -> Norm:
        shared = modality is Modality.TEXT or self.config.semvie.share_norms
        return self.language_norm if shared else self.visual_norm

    def _decoder(self, segment: Segment, cache: StaticCache) -> Decoder | CompiledSteps | None:
        """A quicker way through the layers, for image positions; the kernel's is built when a cache first asks."""
        if segment.modality is Modality.TEXT or segment.mask is not None:
            return None
        if self.steps is not None:
            return self.steps
        if segment.ids.shape[1] > MOST_POSITIONS:
            return None
        if not cache.sought:
            cache.decoder, cache.sought = build_decoder(self.layers, cache, self.halves), True
        return cache.decoder

    def _run(
        self, layer: nn.Module, x_BTD: Tensor, modality: Modality, *, cache: Cache, rotary: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One layer; as a function of tensors alone where it is compiled, or computed again in the backward pass."""
        assert isinstance(layer, SemVIELayer)
        recompute = self.recompute and torch.is_grad_enabled()
        if not (recompute or self.compiled):
            return cast(Tensor, layer(x_BTD, modality, cache=cache, rotary=rotary, mask=mask))
        arguments = (x_BTD, cache.keys[layer.index], cache.values[layer.index], modality, rotary, mask)
        found = checkpoint(layer.alone, *arguments, use_reentrant=False) if recompute else layer.alone(*arguments)
        x_BTD, cache.keys[layer.index], cache.values[layer.index] = found
        return x_BTD

    def compile_layers(self) -> None:
        """Compiles every layer, and what predicts codes of cells, at first use, for training; a static cache is
        filled in place and cannot be used."""
        self.compiled = True
        for layer in self.layers:
            assert isinstance(layer, SemVIELayer)
            layer.alone = torch.compile(layer.alone, dynamic=True)  # type: ignore[method-assign]
        if self.vocabulary.slots > 1:
            compiled = torch.compile(self.visual_cells.forward, dynamic=True)
            self.visual_cells.forward = compiled  # type: ignore[method-assign]

    def compile_steps(self) -> None:
        """Compiles steps of drawing at their first use, for a GPU: minutes that many pictures must pay back.

        Raises:
            ModelError: if nothing can be compiled for its device.
        """
        self.steps = CompiledSteps(self.layers, self.device)

    @property
    def released(self) -> bool:
        """Whether the language expert has been let go."""
        return not hasattr(self, "language_embedding")

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values; tables may be kept in fewer bits."""
        return self.language_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.language_norm.weight.device

    def embed(self, segment: Segment) -> Tensor:
        """Ids of one modality to the first hidden states (B, T, D)."""
        return self._embed(segment).to(self.dtype)

    def _embed(self, segment: Segment) -> Tensor:
        if segment.modality is Modality.TEXT:
            first = self.vocabulary.first_special
            codes = (segment.ids >= self.vocabulary.first_code) & (segment.ids < first)
            assert not bool(codes.any()), "a text segment holds image codes"
            text: Tensor = self.language_embedding(segment.ids.clamp(max=self.config.language.vocab_size - 1))
            special = segment.ids >= first
            if not bool(special.any()):
                return text
            rows: Tensor = self.special_embedding((segment.ids - first).clamp(min=0))
            return torch.where(special[..., None], rows, text)
        rows_of_ids = segment.ids - self.vocabulary.first_code
        if self.vocabulary.slots == 1:
            visual: Tensor = self.visual_embedding(rows_of_ids)
        else:
            slots_K = torch.arange(self.vocabulary.slots, device=segment.ids.device)
            visual = self.visual_embedding(rows_of_ids + slots_K * self.vocabulary.visual_rows).sum(dim=2)
        if self.config.semvie.grid_embedding:
            rows, columns = (place.clamp(max=self.config.semvie.max_grid) for place in segment.places())
            visual = visual + self.visual_grid["rows"][rows] + self.visual_grid["columns"][columns]
        if segment.low is not None:
            low: Tensor = self.visual_embedding(segment.low - self.vocabulary.first_code)
            visual = visual + self.low_projection(low.to(self.dtype))
        return visual

    def text_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits of text ids at text positions, (B, T, V): the LLM's own."""
        if hasattr(self, "language_head"):
            return cast(Tensor, self.language_head(hidden_BTD))
        return nn.functional.linear(hidden_BTD, self.text_table)

    @property
    def text_table(self) -> Tensor:
        """(V, D) the weights of `text_logits`: the head's, or the embedding's (or its half) where both are one."""
        if hasattr(self, "language_head"):
            return self.language_head.weight
        return self.language_embedding.weight if self.text_half is None else self.text_half

    @property
    def visual_table(self) -> Tensor:
        """(visual rows, D) the weights of `visual_logits`."""
        return self.visual_head.weight

    def special_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits of special and dead ids at text positions: how text predicts `<img>`."""
        return cast(Tensor, self.special_head(hidden_BTD))

    def code_states(self, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
        """States that predict the codes of image positions, one for each target: those of `forward`, or with cells
        (B, T, K, E), where each code of a cell is predicted from those before it.

        Args:
            targets: ids, (B, T) or (B, T, K); anything where no code is predicted.
        """
        if self.vocabulary.slots == 1:
            return hidden_BTD
        codes = (targets - self.vocabulary.first_code).clamp(0, self.vocabulary.num_codes - 1)
        return cast(Tensor, self.visual_cells(hidden_BTD, codes))

    def next_state(self, hidden_BTD: Tensor, chosen: Sequence[Tensor]) -> Tensor:
        """The state (B, T, D or E) that predicts the next code of each position, after `chosen` codes (B, T) of it."""
        if self.vocabulary.slots == 1:
            return hidden_BTD
        return self.visual_cells.next_state(hidden_BTD, chosen, self._product)

    def visual_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits of the visual rows after `code_states` or `next_state`: codes first, then special and dead ids."""
        return self._product("visual_head", self.visual_head, hidden_BTD)

    def _product(self, name: str, linear: nn.Module, x: Tensor) -> Tensor:
        """What a layer behind the stack makes of an x: by its copy in 16 bits, where drawing has one."""
        copied = self.halves is not None and x.device.type == "cpu" and not torch.is_grad_enabled()
        if not (copied and isinstance(linear, nn.Linear)):
            return cast(Tensor, linear(x))
        assert self.halves is not None
        return self.halves.of(name, linear).multiply(x)[..., : linear.out_features]

    def new_cache(self) -> Cache:
        """A cache that grows, for training."""
        return Cache(num_layers=self.config.language.num_layers, visual_layers=self.config.visual_layers)

    def new_static_cache(self, *, batch: int, size: int, images_only: bool = False) -> StaticCache:
        """A cache for at most `batch` rows of at most `size` positions, for inference; loaded prefixes are no text.

        One for images only is in fp16 where the kernel fills it.
        """
        language, device = self.config.language, self.visual_embedding.weight.device
        filled = images_only and self.steps is None and kernel_for(self.layers, self.halves, device) is not None
        return StaticCache(
            num_layers=language.num_layers,
            visual_layers=self.config.visual_layers,
            layers=self.config.visual_layers if images_only else range(language.num_layers),
            batch=batch,
            size=size,
            heads=(language.num_kv_heads, language.head_width),
            dtype=torch.float16 if filled else self.dtype,
            device=device,
        )

    def release_language(self) -> None:
        """Lets the language expert go, but for what it shares: image positions never read the rest."""
        shared = {"attention_norm", "ffn_norm", "q_norm", "k_norm"} if self.config.semvie.share_norms else set()
        if not self.config.semvie.duplicate_output:
            shared.add("o_proj")
        for layer in self.layers:
            assert isinstance(layer, SemVIELayer)
            for name in [name for name, _ in layer.language.named_children() if name not in shared]:
                delattr(layer.language, name)
        for name in ("language_embedding", "language_head"):
            if hasattr(self, name):
                delattr(self, name)

    def language_tensors(self) -> dict[str, Tensor]:
        """The frozen language expert, by name."""
        return {name: weight for name, weight in self.named_parameters() if is_language(name)}

    def visual_tensors(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        return {name: weight for name, weight in self.named_parameters() if not is_language(name)}


@torch.no_grad()
def read_prefixes(transformer: MarsTransformer, rows: Sequence[Sequence[int]]) -> list[Prefix]:
    """Runs rows of text ids through the language expert alone; what image positions will look back at, row by row."""
    cache = transformer.new_cache()
    hidden_BTD = transformer(text_segment(rows).to(transformer.device), cache)
    return cache.prefixes(hidden_BTD)


def build_transformer(
    config: ModelConfig,
    language: Mapping[str, Tensor],
    *,
    visual: Mapping[str, Tensor] | None = None,
    visual_dtype: torch.dtype = torch.float32,
) -> MarsTransformer:
    """A transformer around the given tensors (used as they are, not copied); without `visual` that side is left empty.

    The language expert is frozen by `requires_grad`, so gradients still pass through it.
    """
    with torch.device("meta"):
        transformer = MarsTransformer(config)
    transformer.load_state_dict({**language, **(visual or {})}, strict=False, assign=True)
    for name, weight in transformer.named_parameters():
        if is_language(name):
            assert not weight.is_meta, f"the language model lacks {name}"
            weight.requires_grad_(False)
    for module in transformer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                replacement = nn.Parameter(torch.empty(weight.shape, dtype=visual_dtype, device="cpu"))
                if isinstance(module, nn.ParameterDict):
                    module[name] = replacement
                else:
                    setattr(module, name, replacement)
    return transformer
