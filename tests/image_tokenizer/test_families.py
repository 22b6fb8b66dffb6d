from typing import Any

import pytest
import torch

from mars.errors import CheckpointError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.families import FAMILIES, Family, describe, detect_family
from mars.image_tokenizer.model import ImageTokenizer

TAMING: dict[str, Any] = {
    "num_codes": 16384, "code_width": 256, "channels": (128, 128, 256, 256, 512), "attention_levels": (4,),
    "middle_attention": True,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "openmuse": ({"pixel_range": (0.0, 1.0)}, 146.2),
    "amused": ({"pixel_range": (0.0, 1.0)}, 146.2),
    "taming": (TAMING, 0),
    "chameleon": (TAMING | {"num_codes": 8192, "attention_levels": ()}, 0),
    "ibq": (TAMING | {"num_codes": 8192, "blocks_per_level": 4, "code_choice": "dot"}, 0),
    "llamagen": (TAMING | {"code_width": 8, "latent_channels": 256, "code_choice": "cosine"}, 0),
    "show-o": (
        {
            "code_width": 13, "channels": (128, 256, 256, 512, 512), "blocks_per_level": (4, 3, 4, 3, 4),
            "decoder_channels": (128, 128, 256, 256, 512), "decoder_blocks": (4, 4, 3, 4, 3), "code_choice": "lfq",
            "middle_attention": True,
        },
        95.4,
    ),
}  # fmt: skip
"""Configurations as published, and millions of parameters where a source gives them."""
CONFIGS: dict[str, dict[str, Any]] = {
    "amused": {"_class_name": "VQModel", "lookup_from_codebook": True},
    "openmuse": {"_class_name": "VQGANModel"},
}


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a published tokenizer, under the names of its family."""
    config = ImageTokenizerConfig(**PUBLISHED[name][0])
    with torch.device("meta"):
        tensors = ImageTokenizer(config).state_dict()
    made = {"quantizer.bias", *(["quantizer.embedding.weight"] if name == "show-o" else [])}
    shapes = {
        FAMILIES[name].name(ours, len(config.channels)): tuple(tensor.shape)
        for ours, tensor in tensors.items()
        if ours not in made
    }
    if name == "ibq":
        shapes |= {f"model_ema.{theirs.replace('.', '')}": shape for theirs, shape in shapes.items()}
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tokenizer_is_recognised_and_described(name: str) -> None:
    shapes = published_shapes(name)
    assert detect_family(shapes, CONFIGS.get(name), source="file") == name
    assert detect_family(shapes, None, source="file") == name
    config = describe(shapes, FAMILIES[name], norm_groups=32, source="file")
    assert config == ImageTokenizerConfig(**PUBLISHED[name][0])
    assert config.factor == 16


@pytest.mark.parametrize("name", [name for name, (_, millions) in PUBLISHED.items() if millions])
def test_a_published_tokenizer_has_its_published_size(name: str) -> None:
    config, millions = PUBLISHED[name]
    with torch.device("meta"):
        tokenizer = ImageTokenizer(ImageTokenizerConfig(**config))
    codebook = 0 if name != "show-o" else tokenizer.quantizer.embedding.weight.numel()  # LFQ has none
    assert round((sum(weight.numel() for weight in tokenizer.parameters()) - codebook) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("taming", "encoder.down.1.block.0.nin_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("taming", "quantizer.embedding.weight", "quantize.embedding.weight"),
        (
            "amused",
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        ),
        ("amused", "encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
        ("amused", "decoder.up.4.block.2.norm1.bias", "decoder.up_blocks.0.resnets.2.norm1.bias"),
        ("amused", "decoder.up.1.upsample.conv.weight", "decoder.up_blocks.3.upsamplers.0.conv.weight"),
        ("amused", "encoder.mid.block_2.conv1.weight", "encoder.mid_block.resnets.1.conv1.weight"),
        ("amused", "decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ("diffusers", "encoder.mid.attn_1.norm.weight", "encoder.mid_block.attentions.0.group_norm.weight"),
        ("diffusers", "encoder.down.4.attn.1.q.weight", "encoder.down_blocks.4.attentions.1.to_q.weight"),
        ("diffusers", "decoder.up.4.attn.0.proj_out.bias", "decoder.up_blocks.0.attentions.0.to_out.0.bias"),
        ("llamagen", "encoder.down.4.attn.1.k.weight", "encoder.conv_blocks.4.attn.1.k.weight"),
        ("llamagen", "decoder.up.3.block.0.conv2.bias", "decoder.conv_blocks.1.res.0.conv2.bias"),
        ("llamagen", "decoder.mid.attn_1.proj_out.weight", "decoder.mid.1.proj_out.weight"),
        ("show-o", "quant_conv.bias", "encoder.quant_conv.bias"),
        ("show-o", "post_quant_conv.weight", "decoder.post_quant_conv.weight"),
        ("show-o", "encoder.mid.attn_1.q.weight", "encoder.mid.attn_1.q.weight"),
    ],
)
def test_names_are_those_of_the_published_files(family: str, ours: str, theirs: str) -> None:
    assert FAMILIES[family].name(ours, 5) == theirs


def test_latent_diffusion_in_the_layout_of_diffusers_is_not_taken_for_amused() -> None:
    config = {"_class_name": "VQModel", "lookup_from_codebook": False}
    assert detect_family(published_shapes("amused"), config, source="file") == "diffusers"
    with_attention = published_shapes("amused") | {"encoder.mid_block.attentions.0.to_q.weight": (768, 768)}
    assert detect_family(with_attention, CONFIGS["amused"], source="file") == "diffusers"


@pytest.mark.parametrize("case", ["deep", "averages", "no attention", "muse"])
def test_what_fits_several_families_must_be_named(case: str) -> None:
    shapes, config = published_shapes("taming"), None
    if case == "deep":  # IBQ without averages, or a deep VQ-GAN of taming
        shapes = {name: shape for name, shape in published_shapes("ibq").items() if "model_ema" not in name}
    elif case == "averages":  # latent diffusion's
        shapes["model_ema.decay"] = ()
    elif case == "no attention":
        shapes = published_shapes("openmuse") | {"quantize.embedding.weight": (8192, 3)}
    else:  # muse's class, but a tokenizer of taming: pixels in -1..1?
        config = CONFIGS["openmuse"]
    with pytest.raises(CheckpointError, match=r"tensors fit several; name one with --family: taming .*openmuse .*ibq"):
        detect_family(shapes, config, source="file")


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        ({}, None),
        ({"vision_model.embeddings.weight": (1, 2)}, None),
        ({"encoder.conv_in.weight": (1,), "quant_conv.weight": (1,)}, None),  # a VAE
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, {"_class_name": "AutoencoderKL"}),
    ],
)
def test_an_unknown_family_is_one_line_with_the_known_ones(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None
) -> None:
    with pytest.raises(CheckpointError) as caught:
        detect_family(shapes, config, source="file")
    message = str(caught.value)
    assert message.startswith("file must hold an image tokenizer of a known family, got ")
    assert all(name in message for name in FAMILIES)
    assert "\n" not in message


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_describing_nothing_names_the_tensor_that_is_missing(family: Family) -> None:
    with pytest.raises(CheckpointError, match=r"^file must hold encoder\.[\w.]+, got no such tensor; choose another"):
        describe({}, family, norm_groups=32, source="file")
