"""Image tokenizers of others: how each family names its tensors, and what its files do not say.

All are VQ-GANs of the taming kind. Widths, depths and places of attention are read off the tensors. The code choice and
the pixel range are in no file, so they belong to the family; a wrong pixel range gives washed-out pictures, no error.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mars.errors import CheckpointError
from mars.image_tokenizer.config import ImageTokenizerConfig

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to store a VQ-GAN."""

    about: str
    """Whose tokenizers these are."""
    renames: tuple[tuple[str, str], ...]
    """Patterns and what takes their place, applied in order: from our names, which are nearly taming's, to theirs."""
    coarsest_first: bool = False
    """Whether the levels of their decoder count from the coarsest; ours and taming's count from the finest."""
    code_choice: str = "l2"
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    ignored: str = r"loss\."
    """A pattern: names that begin so are no part of the tokenizer (losses, counters, fixed codebooks)."""
    averaged: bool = False
    """Whether the weights to use are the running averages that lie beside the last ones."""

    def name(self, ours: str, levels: int) -> str:
        """Our name of a tensor, or the start of one, in a tokenizer of so many levels -> theirs."""
        if self.coarsest_first:
            ours = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up.{levels - 1 - int(level[1])}", ours)
        for pattern, theirs in self.renames:
            ours = re.sub(pattern, theirs, ours)
        return ours


TAMING = ((r"^quantizer\.", "quantize."),)
DIFFUSERS = (
    *TAMING,
    (r"(\.attn.*)\.norm\.", r"\1.group_norm."),
    (r"(\.attn.*)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn.*)\.proj_out\.", r"\1.to_out.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"^decoder\.up\.", "decoder.up_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
LLAMAGEN = (
    *TAMING,
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"^(en|de)coder\.(down|up)\.", r"\1coder.conv_blocks."),
    (r"\.block\.", ".res."),
)
SHOW_O = ((r"^quant_conv\.", "encoder.quant_conv."), (r"^post_quant_conv\.", "decoder.post_quant_conv."))

FAMILIES: Mapping[str, Family] = {
    "openmuse": Family(about="open-muse's VQGANModel trained on LAION", renames=TAMING, pixel_range=(0.0, 1.0)),
    "amused": Family(
        about="aMUSEd, a folder of diffusers' VQModel", renames=DIFFUSERS, coarsest_first=True, pixel_range=(0.0, 1.0)
    ),
    "diffusers": Family(about="any other VQModel of diffusers", renames=DIFFUSERS, coarsest_first=True),
    "taming": Family(about="taming-transformers' VQModel", renames=TAMING),
    "chameleon": Family(about="Chameleon, Anole, Lumina-mGPT", renames=TAMING),
    "ibq": Family(about="SEED-Voken's IBQ", renames=TAMING, code_choice="dot", averaged=True),
    "llamagen": Family(
        about="LlamaGen's VQ-8 and VQ-16",
        renames=LLAMAGEN,
        coarsest_first=True,
        code_choice="cosine",
        ignored=r"quantize\.codebook_used$",
    ),
    "show-o": Family(
        about="Show-o's MAGVITv2",
        renames=SHOW_O,
        code_choice="lfq",
        ignored=r"quantize\.(embedding|power_vals)$",
    ),
}
"""Every family that we read, by the name that a user gives."""


def known_families() -> str:
    """The families in one line, for messages."""
    return "; ".join(f"{name} ({family.about})" for name, family in FAMILIES.items())


def _count(names: Collection[str], start: str) -> int:
    """How many numbers from 0 on follow `start` in names."""
    numbers = (re.match(r"\d+", name[len(start) :]) for name in names if name.startswith(start))
    found = {int(number[0]) for number in numbers if number}
    return next(count for count in range(len(found) + 1) if count not in found)


def detect_family(shapes: Shapes, config: Mapping[str, Any] | None, *, source: str) -> str:
    """The family that names of tensors and `config.json` tell.

    Raises:
        CheckpointError: if it is none that we know, or if several families look like this.
    """
    class_name = (config or {}).get("_class_name")
    if _count(shapes, "encoder.conv_blocks."):
        return "llamagen"
    if "encoder.quant_conv.weight" in shapes:
        return "show-o"
    if _count(shapes, "encoder.down_blocks.") and class_name in (None, "VQModel"):
        # aMUSEd has no attention, and says that it looks codes up; tokenizers of latent diffusion do not.
        plain = not _count(shapes, "encoder.mid_block.attentions.")
        return "amused" if plain and (config or {}).get("lookup_from_codebook", True) else "diffusers"
    needed = {"encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight"}
    if not needed <= shapes.keys() or not _count(shapes, "encoder.down.") or class_name not in (None, "VQGANModel"):
        some = ", ".join(sorted(shapes)[:2]) or "nothing"
        raise CheckpointError(
            f"{source} must hold an image tokenizer of a known family, got {class_name or 'tensors'} with {some}; "
            f"known are {known_families()}"
        )
    if (found := _taming_like(shapes, muse=class_name is not None)) is None:
        raise CheckpointError(
            f"{source} must say of which family it is, but its tensors fit several; name one with --family: "
            "taming (pixels in -1..1), openmuse (0..1) or ibq (-1..1, codes by dot product)"
        )
    return found


def _taming_like(shapes: Shapes, *, muse: bool) -> str | None:
    """Which of the families with taming's names it is; None if it cannot be told."""
    attention = "encoder.mid.attn_1.q.weight" in shapes
    averaged = any(name.startswith("model_ema.") for name in shapes)
    deep = _count(shapes, "encoder.down.0.block.") == 4
    book = tuple(shapes["quantize.embedding.weight"])
    if averaged or deep:  # latent diffusion stores averages too, but is not as deep
        return "ibq" if averaged and deep and attention and not muse else None
    if muse or not attention:  # latent diffusion has tokenizers without attention, and muse imported taming's
        return "openmuse" if not attention and (muse or book == (8192, 64)) else None
    plain = not any(re.match(r"encoder\.down\.\d+\.attn\.", name) for name in shapes)
    return "chameleon" if plain and book == (8192, 256) else "taming"


def describe(shapes: Shapes, family: Family, *, norm_groups: int, source: str) -> ImageTokenizerConfig:
    """The configuration that makes these tensors fit.

    Raises:
        CheckpointError: if a tensor is missing that the sizes are read from.
        ConfigError: if the sizes are none that our model can have.
    """
    levels = _count(shapes, family.name("encoder.down.", 0))

    def find(ours: str) -> Sequence[int]:
        name = family.name(ours, levels)
        if name not in shapes:
            raise CheckpointError(f"{source} must hold {name}, got no such tensor; choose another family or file")
        if not shapes[name]:
            raise CheckpointError(f"{source}: {name} must have dimensions, got a single number")
        return shapes[name]

    def widths(part: str) -> tuple[int, ...]:
        return tuple(find(f"{part}.{level}.block.0.conv1.weight")[0] for level in range(levels))

    def blocks(part: str) -> tuple[int, ...]:
        return tuple(_count(shapes, family.name(f"{part}.{level}.block.", levels)) for level in range(levels))

    if not levels:
        find("encoder.down.0.block.0.conv1.weight")
    channels, up_channels = widths("encoder.down"), widths("decoder.up")
    down, up = blocks("encoder.down"), blocks("decoder.up")
    latent, code_width = find("encoder.conv_out.weight")[0], find("quant_conv.weight")[0]
    lookup_free = family.code_choice == "lfq"
    return ImageTokenizerConfig(
        num_codes=2**code_width if lookup_free else find("quantizer.embedding.weight")[0],
        code_width=code_width,
        channels=channels,
        blocks_per_level=down[0] if len(set(down)) == 1 else down,
        attention_levels=tuple(
            level for level in range(levels) if _count(shapes, family.name(f"encoder.down.{level}.attn.", levels))
        ),
        middle_attention=family.name("encoder.mid.attn_1.q.weight", levels) in shapes,
        norm_groups=norm_groups,
        code_choice=family.code_choice,
        pixel_range=family.pixel_range,
        latent_channels=None if latent == code_width else latent,
        decoder_channels=None if up_channels == channels else up_channels,
        decoder_blocks=None if up == tuple(one + 1 for one in down) else up[0] if len(set(up)) == 1 else up,
    )
