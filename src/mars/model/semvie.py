"""SemVIE: one decoder layer with two experts that meet only in attention.

Which expert works on a position is decided by its modality (Semantic Vision-Language Integration Expert, arXiv
2407.07614): `.language` is the frozen LLM's layer, `.visual` the trained one. Keys and values of both lie in one cache.

Letters: B batch, T positions, S columns, D width of the segment's modality.
"""

from torch import Tensor, nn

from mars.model.cache import Cache, LayerCache
from mars.model.config import ModelConfig
from mars.model.layers import Expert, Norm, attend
from mars.model.rope import rotate
from mars.sequence.layout import Modality


class SemVIELayer(nn.Module):
    """One layer. `visual` is None where the layer has no visual expert; image positions then skip it."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        language, semvie = config.language, config.semvie
        heads = (language.num_heads, language.num_kv_heads, language.head_width)
        self.language = Expert(
            width=language.width,
            ffn=language.ffn,
            heads=heads,
            eps=language.norm_eps,
            qkv_bias=language.qkv_bias,
            qk_norm=language.qk_norm,
        )
        self.visual: Expert | None = None
        if index in config.visual_layers:
            self.visual = Expert(
                width=config.visual_width,
                ffn=config.visual_ffn,
                heads=heads,
                eps=language.norm_eps,
                qkv_bias=language.qkv_bias,
                qk_norm=language.qk_norm,
                head_norms=semvie.head_norms,
                own_norms=not semvie.share_norms,
                own_output=semvie.duplicate_output,
            )
        self.share_norms = semvie.share_norms
        self.qk_norm = language.qk_norm

    def forward(
        self, x_BTD: Tensor, modality: Modality, *, cache: Cache | LayerCache, rotary: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Runs one segment's positions and leaves their keys and values in the cache. (B, T, D), the same out."""
        if modality is Modality.IMAGE and self.visual is None:
            return x_BTD
        expert = self.expert(modality)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.extend(self.index, rotate(k, rotary), v)
            return attend(rotate(q, rotary), keys, values, mask)

        x_BTD, _, _ = expert(x_BTD, attention, norms=self.norms_of(expert), output=self.output_of(expert))
        return x_BTD

    def alone(
        self,
        x_BTD: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        modality: Modality,
        rotary: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same as a function of tensors alone: keys and values so far go in, and come out with the segment's."""
        cache = LayerCache(keys, values)
        x_BTD = self(x_BTD, modality, cache=cache, rotary=rotary, mask=mask)
        return x_BTD, cache.keys, cache.values

    def expert(self, modality: Modality) -> Expert:
        """Whose weights work on a modality."""
        expert = self.language if modality is Modality.TEXT else self.visual
        assert expert is not None, "image positions skip a layer without a visual expert"
        return expert

    def norms_of(self, expert: Expert) -> dict[str, Norm]:
        """The norms on an expert's way, by name: its own or the language expert's, and of heads those there are."""
        shared = self.language if self.share_norms else expert
        norms = {"attention_norm": shared.attention_norm, "ffn_norm": shared.ffn_norm}
        if expert.head_norms:
            return norms | {"q_norm": expert.q_norm, "k_norm": expert.k_norm, "v_norm": expert.v_norm}
        return norms | {"q_norm": shared.q_norm, "k_norm": shared.k_norm} if self.qk_norm else norms

    def output_of(self, expert: Expert) -> nn.Module:
        """Attention's output projection for an expert: its own or the language expert's."""
        return expert.o_proj if hasattr(expert, "o_proj") else self.language.o_proj
