"""Oracles: VQ-GANs of diffusers with random weights, and the same weights under the names of other projects."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SMALL: dict[str, Any] = {"channels": (32, 64), "latent": 16, "width": 8, "codes": 64, "blocks": 2}


@pytest.fixture(scope="session")
def draw_weights() -> Callable[..., None]:
    """Fills a VQ-GAN with weights under which every layer shows and nothing blows up; then spreads its codebook."""

    @torch.no_grad()
    def draw(model: Any, *, vectors: Callable[[Tensor], Tensor] | None = None) -> None:
        for name, weight in model.named_parameters():
            values = torch.randn_like(weight)
            if weight.dim() > 1:
                weight.copy_(values * (weight.numel() / len(weight)) ** -0.5)
            else:
                weight.copy_(0.1 * values + (1 if "norm" in name and name.endswith("weight") else 0))
        if vectors is not None:
            found = vectors(torch.rand(1, 3, 64, 64)).permute(0, 2, 3, 1).flatten(0, 2)
            book = model.quantize.embedding.weight
            book.copy_(torch.randn_like(book) * found.std(dim=0) + found.mean(dim=0))

    return draw


@pytest.fixture(scope="session")
def vq_model(draw_weights: Callable[..., None]) -> Callable[..., Any]:
    """Builds a VQModel of diffusers; `levels` have attention beside the middle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import VQModel

    def build(*, levels: tuple[int, ...] = (), middle: bool = True, **changes: Any) -> Any:
        shape = SMALL | changes
        attention = [level in levels for level in range(len(shape["channels"]))]
        model = VQModel(
            down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
            up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
            block_out_channels=shape["channels"],
            layers_per_block=shape["blocks"],
            latent_channels=shape["latent"],
            vq_embed_dim=shape["width"],
            num_vq_embeddings=shape["codes"],
            mid_block_add_attention=middle,
            lookup_from_codebook=True,
        ).eval()
        draw_weights(model, vectors=lambda images: model.encode(images).latents)
        return model

    return build


@pytest.fixture(scope="session")
def taming_tensors() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The tensors of a VQModel of diffusers as taming-transformers stores them, openMUSE, Chameleon and IBQ too."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        state = model.state_dict()
        levels = 1 + max(int(found[1]) for name in state if (found := re.match(r"encoder\.down_blocks\.(\d+)", name)))
        renamed = {}
        for name, tensor in state.items():
            ours = taming_name(name, levels)
            matrix = tensor.dim() == 2 and "attn" in ours
            renamed[ours] = tensor[:, :, None, None] if matrix else tensor
        return renamed

    return tensors


def taming_name(name: str, levels: int) -> str:
    """The name in diffusers -> the name in taming-transformers."""
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    name = name.replace("encoder.down_blocks.", "encoder.down.")
    name = name.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
    name = name.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = name.replace(".group_norm.", ".norm.").replace(".to_out.0.", ".proj_out.")
    return re.sub(r"\.to_([qkv])\.", r".\1.", name)


@pytest.fixture(scope="session")
def janus_vqvae(draw_weights: Callable[..., None]) -> Callable[..., Any]:
    """Builds a JanusVQVAE of transformers, whose design is LlamaGen's, with a codebook of unit vectors."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    def build(**changes: Any) -> Any:
        fields = {"base_channels": 32, "channel_multiplier": (1, 2), "latent_channels": 16, "num_embeddings": 64}
        model = JanusVQVAE(JanusVQVAEConfig(**(fields | changes))).eval()
        draw_weights(model, vectors=lambda images: model.quant_conv(model.encoder(images)))
        # It does not normalise what it looks for, so without unit vectors its codes would not be LlamaGen's.
        model.quantize.embedding.weight.data = nn.functional.normalize(model.quantize.embedding.weight.data, dim=1)
        return model

    return build


@pytest.fixture(scope="session")
def llamagen_tensors() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The tensors of a JanusVQVAE as LlamaGen stores them."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in model.state_dict().items():
            name = name.replace("encoder.down.", "encoder.conv_blocks.").replace("decoder.up.", "decoder.conv_blocks.")
            name = name.replace(".block.", ".res.").replace("mid.block_1", "mid.0").replace("mid.block_2", "mid.2")
            renamed[name.replace("mid.attn_1", "mid.1")] = tensor
        renamed["quantize.codebook_used"] = torch.zeros(65536)
        return renamed

    return tensors


@pytest.fixture(scope="session")
def chameleon_encoder() -> Callable[..., Any]:
    """Opens tensors of Chameleon with the ChameleonVQVAE of transformers, which only encodes."""
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    def build(tensors: dict[str, Tensor], **fields: Any) -> Any:
        model = ChameleonVQVAE(ChameleonVQVAEConfig(**fields)).eval()
        model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")})
        return model

    return build
