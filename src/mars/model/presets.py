"""Named shapes of MARS: the paper's, mars-mini's, and what MARS would be on other LLMs.

A preset has no weights. It is for sizing a model before anything is downloaded (`model.costs`); a real LLM's own
configuration decides when it is opened. Shapes are those of the LLMs' published configurations, as generally known;
the positions are the base models'.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from mars.errors import RequestError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig

PAPER_IMAGE_TOKENIZER = ImageTokenizerConfig(pixel_range=(0.0, 1.0))
"""openMUSE's f16 / 8,192 VQ-GAN: very likely the paper's, whose README thanks open-muse; it names none itself."""
MINI_IMAGE_TOKENIZER = ImageTokenizerConfig(
    num_codes=1024, code_width=12, channels=(96, 192), blocks_per_level=1, patch=4, norm="place"
)
"""That of mars-mini."""
MINI_SEMVIE = SemVIEConfig(
    share_norms=False,
    visual_width=384,
    visual_ffn=1152,
    visual_layers=(4, 9, 14, 19, 24, 29),
    init="random",
    head_norms=True,
    grid_embedding=True,
    max_grid=16,
    cell=2,
)
"""That of mars-mini, as in configs/mini-pretrain.toml."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shapes of a whole MARS."""

    name: str
    model: ModelConfig
    image_tokenizer: ImageTokenizerConfig = PAPER_IMAGE_TOKENIZER
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of codes of a picture before super-resolution."""
    note: str = "ours: the paper's visual expert on this LLM"
    """Whose choice it is."""


def _shapes(
    vocab: int,
    width: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    *,
    positions: int,
    theta: float,
    eps: float,
    tied: bool,
    head_width: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> LanguageConfig:
    """An LLM's shapes; `heads` are those of queries and of keys."""
    return LanguageConfig(
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_width=head_width or width // heads[0],
        ffn=ffn,
        rope_theta=theta,
        norm_eps=eps,
        max_positions=positions,
        tied_embeddings=tied,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


_qwen2 = partial(_shapes, positions=32_768, theta=1e6, eps=1e-6, tied=True, qkv_bias=True)
"""Qwen1.5 and Qwen2.5: a bias on queries, keys and values."""
_qwen3 = partial(_shapes, 151_936, positions=40_960, theta=1e6, eps=1e-6, tied=True, head_width=128, qk_norm=True)
"""Qwen3: norms of queries and keys, heads of 128 whatever the width, eight of keys."""
_llama = partial(_shapes, eps=1e-5)
"""Llama 2 and 3, SmolLM2: no bias."""

QWEN_7B = _qwen2(151_936, 4096, 32, (32, 32), 11_008, positions=8192, theta=1e4, tied=False)
"""Qwen-7B, first generation: the paper's LLM."""

_LANGUAGE = {
    "qwen1.5-0.5b": _qwen2(151_936, 1024, 24, (16, 16), 2816),
    "qwen1.5-1.8b": _qwen2(151_936, 2048, 24, (16, 16), 5504, tied=False),
    "qwen1.5-7b": _qwen2(151_936, 4096, 32, (32, 32), 11_008, tied=False),
    "qwen1.5-14b": _qwen2(152_064, 5120, 40, (40, 40), 13_696, tied=False),
    "qwen2.5-0.5b": _qwen2(151_936, 896, 24, (14, 2), 4864),
    "qwen2.5-1.5b": _qwen2(151_936, 1536, 28, (12, 2), 8960, positions=131_072),
    "qwen2.5-3b": _qwen2(151_936, 2048, 36, (16, 2), 11_008),
    "qwen2.5-7b": _qwen2(152_064, 3584, 28, (28, 4), 18_944, positions=131_072, tied=False),
    "qwen2.5-14b": _qwen2(152_064, 5120, 48, (40, 8), 13_824, positions=131_072, tied=False, eps=1e-5),
    "qwen3-0.6b": _qwen3(1024, 28, (16, 8), 3072),
    "qwen3-1.7b": _qwen3(2048, 28, (16, 8), 6144),
    "qwen3-4b": _qwen3(2560, 36, (32, 8), 9728),
    "qwen3-8b": _qwen3(4096, 36, (32, 8), 12_288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, (40, 8), 17_408, tied=False),
    "llama-2-7b": _llama(32_000, 4096, 32, (32, 32), 11_008, theta=1e4, positions=4096, tied=False),
    "llama-3-8b": _llama(128_256, 4096, 32, (32, 8), 14_336, theta=5e5, positions=8192, tied=False),
    "smollm2-360m": _llama(49_152, 960, 32, (15, 5), 2560, theta=1e5, positions=8192, tied=True),
    "smollm2-1.7b": _llama(49_152, 2048, 24, (32, 32), 8192, theta=1.3e5, positions=8192, tied=True),
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        Preset(
            name="qwen-7b",
            model=ModelConfig(language=QWEN_7B),
            note="the paper's LLM and vocabulary; its visual expert as far as its figure shows it",
        ),
        Preset(
            name="smollm2-135m",
            model=ModelConfig(
                language=_llama(49_152, 576, 30, (9, 3), 1536, theta=1e5, positions=8192, tied=True),
                semvie=MINI_SEMVIE,
                num_codes=MINI_IMAGE_TOKENIZER.num_codes,
            ),
            image_tokenizer=MINI_IMAGE_TOKENIZER,
            note="ours: mars-mini",
        ),
        *(Preset(name=name, model=ModelConfig(language=language)) for name, language in _LANGUAGE.items()),
    ]
}
"""Every preset by its name."""


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        RequestError: if there is none, with the nearest names.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(PRESETS)}"
    raise RequestError(f"preset must be a known name, got {name!r}; {known}")
