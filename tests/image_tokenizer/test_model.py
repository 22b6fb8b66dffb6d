import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mars.errors import ImageError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer, reconstruct


def tiny(**changes: Any) -> ImageTokenizer:
    """A tokenizer with codes as wide apart as its vectors, so that many codes are in use."""
    shape: dict[str, Any] = {"num_codes": 64, "code_width": 4, "channels": (32, 64), "blocks_per_level": 1}
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**(shape | changes))).eval()
    if tokenizer.config.code_choice != "lfq":
        with torch.no_grad():
            vectors = tokenizer.to_vectors(torch.rand(4, 3, 32, 32)).permute(0, 2, 3, 1).flatten(0, 2)
            spread = torch.randn_like(tokenizer.quantizer.embedding.weight)
            tokenizer.quantizer.embedding.weight.copy_(spread * vectors.std(dim=0) + vectors.mean(dim=0))
    return tokenizer


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[ImageTokenizer], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import VQModel

    def twin(ours: ImageTokenizer) -> Any:
        config, levels = ours.config, len(ours.config.channels)
        attention = [level in config.attention_levels for level in range(levels)]
        model = VQModel(
            down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
            up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
            block_out_channels=config.channels,
            layers_per_block=config.blocks_per_level,
            latent_channels=config.code_width,
            num_vq_embeddings=config.num_codes,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.middle_attention,
        )
        weights = dict(ours.named_parameters())  # without the bias of codes, which is 0 here and unknown there
        state = {diffusers_name(name, levels): tensor for name, tensor in weights.items()}
        wanted = model.state_dict()
        assert state.keys() == wanted.keys()
        model.load_state_dict({name: tensor.reshape(wanted[name].shape) for name, tensor in state.items()})
        return model.eval()

    return twin


def diffusers_name(name: str, levels: int) -> str:
    """Taming's name of a tensor -> that of diffusers."""
    name = re.sub(r"encoder\.down\.(\d+)", r"encoder.down_blocks.\1", name)
    name = re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"mid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}", name)
    name = name.replace("mid.attn_1", "mid_block.attentions.0").replace("quantizer.", "quantize.")
    name = (
        name.replace(".block.", ".resnets.").replace(".attn.", ".attentions.").replace("nin_shortcut", "conv_shortcut")
    )
    name = name.replace("downsample.", "downsamplers.0.").replace("upsample.", "upsamplers.0.")
    name = name.replace("norm_out", "conv_norm_out")
    if ".attentions." in name:
        name = re.sub(r"\.norm\.", ".group_norm.", name)
        name = re.sub(r"\.([qkv])\.(weight|bias)$", r".to_\1.\2", name).replace("proj_out", "to_out.0")
    return name


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("channels", [(32, 64), (64, 32, 32)], ids=str)
@pytest.mark.parametrize(
    "attention", [{}, {"attention_levels": (1,), "middle_attention": True}], ids=["plain", "attention"]
)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
@torch.no_grad()
def test_codes_and_pictures_are_those_of_diffusers(
    diffusers_twin: Callable[[ImageTokenizer], Any],
    blocks: int,
    channels: tuple[int, ...],
    attention: dict[str, Any],
    size: tuple[int, int],
) -> None:
    ours = tiny(channels=channels, blocks_per_level=blocks, **attention)
    twin = diffusers_twin(ours)
    images = torch.rand(2, 3, *size)
    latents = twin.encode(images * 2 - 1).latents
    torch.testing.assert_close(ours.to_vectors(images), latents, atol=1e-5, rtol=1e-5)
    codes = ours.encode(images)
    assert codes.unique().numel() > 5
    quantized, _, (_, _, wanted) = twin.quantize(latents)
    assert torch.equal(codes.flatten(), wanted.flatten())
    picture = twin.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(ours.decode(codes), (picture / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_the_grid_of_codes_lies_as_the_picture_does(patch: int) -> None:
    tokenizer = tiny(patch=patch)
    images = torch.rand(2, 3, 3 * 2 * patch, 5 * 2 * patch)
    codes, vectors = tokenizer.encode(images), tokenizer.to_vectors(images)
    assert (codes.shape, codes.dtype) == ((2, 3, 5), torch.int64)
    assert tokenizer.decode(codes).shape == images.shape
    for row in range(3):
        for column in range(5):
            assert torch.equal(codes[:, row, column], tokenizer.quantizer.encode(vectors[:, :, row, column]))
    wanted = tokenizer.to_images(tokenizer.quantizer.embedding.weight[codes].permute(0, 3, 1, 2)).clamp(0, 1)
    assert torch.equal(tokenizer.decode(codes), wanted)


@torch.no_grad()
def test_decoding_is_clipped_and_training_is_not() -> None:
    tokenizer = tiny()
    tokenizer.decoder.conv_out.bias = nn.Parameter(torch.full((3,), 9.0))
    codes = torch.zeros(1, 2, 2, dtype=torch.long)
    assert torch.equal(tokenizer.decode(codes), torch.ones(1, 3, 4, 4))
    vectors = tokenizer.quantizer.decode(codes).permute(0, 3, 1, 2)
    assert float(tokenizer.to_images(vectors).min()) > 1


@torch.no_grad()
def test_the_pixel_range_is_what_the_network_sees() -> None:
    signed, plain = tiny(), tiny(pixel_range=(0.0, 1.0))
    plain.load_state_dict(signed.state_dict())
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(signed.to_vectors(images), plain.to_vectors(images * 2 - 1))
    vectors = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(signed.to_images(vectors) * 2 - 1, plain.to_images(vectors))


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 9), (0, 8), (8, 0)])
def test_a_size_that_is_no_multiple_is_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError) as caught:
        tiny().encode(torch.rand(1, 3, height, width))
    assert str(caught.value) == f"image sides must be multiples of 2, got {width}x{height}"


@torch.no_grad()
def test_pictures_do_not_depend_on_their_batch() -> None:
    tokenizer = tiny(middle_attention=True)
    images = torch.rand(3, 3, 8, 8)
    codes = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(codes, alone)
    wanted = torch.cat([tokenizer.decode(code[None]) for code in codes])
    torch.testing.assert_close(tokenizer.decode(codes), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", ["l2", "cosine", "dot", "lfq"])
def test_reconstruction_is_encode_then_decode_without_a_graph(choice: str) -> None:
    tokenizer = tiny(code_choice=choice, num_codes=16)
    images = torch.rand(1, 3, 8, 8)
    pictures, codes = reconstruct(tokenizer, images)
    assert not pictures.requires_grad
    assert torch.equal(codes, tokenizer.encode(images))
    assert torch.equal(pictures, tokenizer.decode(codes))


def test_the_default_is_the_tokenizer_of_open_muse() -> None:
    with torch.device("meta"):
        tokenizer = ImageTokenizer(ImageTokenizerConfig())
    count = sum(weight.numel() for weight in tokenizer.parameters())
    assert round(count / 1e6, 1) == 146.2


def test_gradients_reach_encoder_and_decoder() -> None:
    tokenizer = tiny(attention_levels=(0, 1), middle_attention=True)
    vectors: Tensor = tokenizer.to_vectors(torch.rand(1, 3, 8, 8))
    tokenizer.to_images(vectors).square().mean().backward()
    for name, weight in tokenizer.named_parameters():
        assert (weight.grad is None) == name.startswith("quantizer"), name


@pytest.mark.parametrize(("norm", "local"), [("place", True), ("group", False)])
def test_norms_of_one_place_keep_a_change_near_where_it_was_made(norm: str, *, local: bool) -> None:
    tokenizer = tiny(norm=norm, patch=4)
    before = torch.rand(1, 3, 128, 128)
    after = before.clone()
    after[:, :, :8, :8] = 0
    moved = (tokenizer.to_vectors(after) - tokenizer.to_vectors(before)).abs().amax(dim=1)[0]
    assert moved[0, 0] > 1e-3
    assert bool((moved[-4:, -4:] < 1e-6).all()) is local
    vectors = torch.randn(1, 4, 16, 16)
    other = vectors.clone()
    other[:, :, 0, 0] += 3
    drawn = (tokenizer.to_images(other) - tokenizer.to_images(vectors)).abs()[0].amax(dim=0)
    assert bool((drawn[-32:, -32:] < 1e-6).all()) is local
