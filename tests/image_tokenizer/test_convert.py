import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mars.checkpoint import codes_digest, load_image_tokenizer, save_image_tokenizer
from mars.errors import CheckpointError, ModelError, RequestError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.convert import Placeholder, convert_image_tokenizer, find_weights, from_tensors, read_weights
from mars.image_tokenizer.families import FAMILIES
from mars.image_tokenizer.model import ImageTokenizer

Tensors = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor], Tensor]


# The ways to choose codes as their papers and code state them: vectors (N, Z), codebook (V, Z) -> scores (N, V).
RULES: dict[str, Rule] = {
    "l2": lambda vectors, book: -distances(vectors, book),
    "dot": lambda vectors, book: vectors @ book.T,
    "cosine": lambda vectors, book: -distances(F.normalize(vectors, dim=1), F.normalize(book, dim=1)),
}
SIZES = [(32, 32), (16, 40)]
F16 = {"channels": (128, 128, 256, 256, 512), "latent": 256, "width": 256}
EXACT: dict[str, dict[str, Any]] = {
    "openmuse": {"channels": (128, 256, 256, 512, 768), "latent": 64, "width": 64, "codes": 8192, "middle": False},
    "taming": F16 | {"codes": 16384, "levels": (4,)},
    "chameleon": F16 | {"codes": 8192},
    "ibq": F16 | {"codes": 8192, "levels": (4,), "blocks": 4},
}
"""Published shapes, as arguments of `vq_model`."""
SMALL: dict[str, dict[str, Any]] = {
    "openmuse": {"latent": 8, "middle": False},
    "taming": {"levels": (1,)},
    "chameleon": {"channels": (32, 32, 64), "latent": 8},
    "ibq": {"levels": (1,), "blocks": 4},
}


def distances(vectors: Tensor, book: Tensor) -> Tensor:
    """Without the product of matrices that would round small ones away."""
    return torch.cdist(vectors, book, compute_mode="donot_use_mm_for_euclid_dist")


def flat(vectors: Tensor) -> Tensor:
    """(B, Z, R, C) -> (N, Z)."""
    return vectors.permute(0, 2, 3, 1).flatten(0, 2)


def clear_case(
    vectors: Callable[[Tensor], Tensor], book: Tensor, *, config: ImageTokenizerConfig, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Images whose codes rounding cannot change, and those codes (N,), by the rule on the oracle's vectors."""
    low, high = config.pixel_range
    for _ in range(20):
        images = torch.rand(1, 3, *size)
        scores = RULES[config.code_choice](flat(vectors(images * (high - low) + low)), book)
        first, second = scores.topk(2, dim=1).values.unbind(dim=1)
        if float((first - second).min()) > 1e-4:
            return images, scores.argmax(dim=1)
    raise AssertionError("every image had two codes that are equally good")


@torch.no_grad()
def check_against_diffusers(ours: ImageTokenizer, oracle: Any, *, size: tuple[int, int]) -> None:
    """Codes by the published rule on the oracle's vectors, pictures by the oracle's decoder."""
    low, high = ours.config.pixel_range
    book = oracle.quantize.embedding.weight
    images, wanted = clear_case(lambda pixels: oracle.encode(pixels).latents, book, config=ours.config, size=size)
    codes = ours.encode(images)
    assert codes.shape == (1, size[0] // ours.config.factor, size[1] // ours.config.factor)
    assert torch.equal(codes.flatten(), wanted)
    assert codes.unique().numel() > 5
    shape = (*codes.shape, ours.config.code_width)
    picture = oracle.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    vectors = ours.quantizer.decode(codes).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.to_images(vectors), (picture - low) / (high - low), atol=1e-4, rtol=0)


def averaged(tensors: Tensors) -> Tensors:
    """As IBQ stores them: the last weights, which are not to be used, and their averages."""
    last = {name: tensor + torch.randn_like(tensor) for name, tensor in tensors.items()}
    averages = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in tensors.items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2), "model_ema.lossdiscriminatormain0weight": torch.ones(2)}
    return last | averages | counters | loss


def convert(family: str, tensors: Tensors, folder: Path) -> ImageTokenizer:
    """Through a file of the kind in which the family is published."""
    if family == "openmuse":
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"_class_name": "VQGANModel"}), "utf-8")
        return convert_image_tokenizer(folder)
    stored = averaged(tensors) if family == "ibq" else tensors | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": stored, "global_step": 3}, folder / "last.ckpt")
    return convert_image_tokenizer(folder / "last.ckpt", family=None if family != "chameleon" else family)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_codes_and_pictures_are_those_of_diffusers(
    family: str, size: tuple[int, int], vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    oracle = vq_model(**SMALL[family])
    ours = convert(family, taming_tensors(oracle), tmp_path)
    assert (ours.config.code_choice, ours.config.pixel_range) == (
        "dot" if family == "ibq" else "l2", (0.0, 1.0) if family == "openmuse" else (-1.0, 1.0)
    )  # fmt: skip
    assert not any(weight.requires_grad for weight in ours.parameters())
    check_against_diffusers(ours, oracle, size=size)


@torch.no_grad()
def test_ibq_is_not_nearest(vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], tmp_path: Path) -> None:
    oracle = vq_model(**SMALL["ibq"])
    ours = convert("ibq", taming_tensors(oracle), tmp_path)
    images = torch.rand(1, 3, 32, 32)
    nearest = oracle.quantize(oracle.encode(images * 2 - 1).latents)[2][2]
    assert float((ours.encode(images).flatten() == nearest.flatten()).float().mean()) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", EXACT)
def test_codes_and_pictures_are_those_of_diffusers_at_published_sizes(
    family: str, vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    oracle = vq_model(**EXACT[family])
    ours = convert(family, taming_tensors(oracle), tmp_path)
    assert ours.config.factor == 16
    check_against_diffusers(ours, oracle, size=(64, 64))


@pytest.mark.slow
def test_a_folder_of_amused_is_read_as_it_is_at_its_published_size(vq_model: Any, tmp_path: Path) -> None:
    oracle = vq_model(**EXACT["openmuse"])
    oracle.save_pretrained(tmp_path / "vqvae")
    ours = convert_image_tokenizer(tmp_path)
    assert ours.config == ImageTokenizerConfig(pixel_range=(0.0, 1.0))
    check_against_diffusers(ours, oracle, size=(64, 64))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_folder_of_amused_is_read_as_it_is(size: tuple[int, int], vq_model: Any, tmp_path: Path) -> None:
    oracle = vq_model(middle=False, channels=(32, 64, 64), latent=8)
    oracle.save_pretrained(tmp_path / "vqvae")
    ours = convert_image_tokenizer(tmp_path)
    assert ours.config.pixel_range == (0.0, 1.0)
    check_against_diffusers(ours, oracle, size=size)


def test_attention_of_diffusers_is_read_too(vq_model: Any, tmp_path: Path) -> None:
    oracle = vq_model(levels=(1,))
    oracle.save_pretrained(tmp_path)
    ours = convert_image_tokenizer(tmp_path)
    assert (ours.config.pixel_range, ours.config.attention_levels) == ((-1.0, 1.0), (1,))
    check_against_diffusers(ours, oracle, size=(16, 16))


@torch.no_grad()
def check_chameleon(oracle: Any, tensors: Tensors, *, encoder: Any, size: tuple[int, int]) -> None:
    ours = from_tensors(tensors, family=FAMILIES["chameleon"], source="test")
    images, _ = clear_case(
        lambda pixels: encoder.quant_conv(encoder.encoder(pixels)),
        encoder.quantize.embedding.weight,
        config=ours.config,
        size=size,
    )
    assert torch.equal(ours.encode(images).flatten(), encoder.encode(images * 2 - 1).image_tokens.flatten())
    check_against_diffusers(ours, oracle, size=size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_of_chameleon_are_those_of_transformers(
    size: tuple[int, int], vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], chameleon_encoder: Any
) -> None:
    oracle = vq_model()
    tensors = taming_tensors(oracle)
    fields = {"embed_dim": 8, "num_embeddings": 64, "latent_channels": 16, "base_channels": 32}
    encoder = chameleon_encoder(tensors, channel_multiplier=(1, 2), resolution=32, **fields)
    check_chameleon(oracle, tensors, encoder=encoder, size=size)


@pytest.mark.slow
def test_codes_of_chameleon_are_those_of_transformers_at_published_sizes(
    vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], chameleon_encoder: Any
) -> None:
    oracle = vq_model(**EXACT["chameleon"])
    tensors = taming_tensors(oracle)
    check_chameleon(oracle, tensors, encoder=chameleon_encoder(tensors), size=(64, 64))


@torch.no_grad()
def check_llamagen(oracle: Any, tensors: Tensors, *, folder: Path, size: tuple[int, int]) -> None:
    book = tensors["quantize.embedding.weight"]
    # Rows of other lengths must not matter to codes or pictures.
    stretched = {"quantize.embedding.weight": book * (0.5 + torch.rand(len(book), 1))}
    torch.save({"model": tensors | stretched}, folder / "vq_ds16_t2i.pt")
    ours = convert_image_tokenizer(folder / "vq_ds16_t2i.pt")
    assert (ours.config.code_choice, ours.config.pixel_range) == ("cosine", (-1.0, 1.0))
    images, wanted = clear_case(
        lambda pixels: oracle.quant_conv(oracle.encoder(pixels)), book, config=ours.config, size=size
    )
    codes = ours.encode(images)
    assert torch.equal(codes.flatten(), wanted)
    assert torch.equal(codes.flatten(), oracle.encode(images * 2 - 1).image_tokens)
    assert codes.unique().numel() > 5
    # Not oracle.decode, which knows one square size only.
    picture = oracle.decoder(oracle.post_quant_conv(book[codes].permute(0, 3, 1, 2)))
    vectors = ours.quantizer.decode(codes).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.to_images(vectors) * 2 - 1, picture, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_and_pictures_of_llamagen_are_those_of_janus(
    size: tuple[int, int], janus_vqvae: Any, llamagen_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    oracle = janus_vqvae()
    check_llamagen(oracle, llamagen_tensors(oracle), folder=tmp_path, size=size)


@pytest.mark.slow
def test_codes_and_pictures_of_llamagen_are_those_of_janus_at_published_sizes(
    janus_vqvae: Any, llamagen_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    oracle = janus_vqvae(
        base_channels=128, channel_multiplier=(1, 1, 2, 2, 4), latent_channels=256, num_embeddings=16384
    )
    check_llamagen(oracle, llamagen_tensors(oracle), folder=tmp_path, size=(64, 64))


@torch.no_grad()
def check_show_o(
    encoder: Any, decoder: Any, taming_tensors: Callable[[nn.Module], Tensors], *, folder: Path, size: tuple[int, int]
) -> ImageTokenizer:
    """Of two VQModels, the encoder of one and the decoder of the other."""
    bits = encoder.quant_conv.out_channels
    tensors = {name: tensor for name, tensor in taming_tensors(encoder).items() if name.startswith("encoder.")}
    tensors |= {name: tensor for name, tensor in taming_tensors(decoder).items() if name.startswith("decoder.")}
    tensors |= {f"encoder.quant_conv.{kind}": tensor for kind, tensor in encoder.quant_conv.state_dict().items()}
    tensors |= {f"decoder.post_quant_conv.{kind}": one for kind, one in decoder.post_quant_conv.state_dict().items()}
    powers = 2 ** torch.arange(bits - 1, -1, -1)
    tensors |= {"quantize.embedding": torch.zeros(2**bits, bits), "quantize.power_vals": powers}
    save_file(tensors, folder / "pytorch_model.safetensors")
    ours = convert_image_tokenizer(folder)
    images = torch.rand(1, 3, *size)
    latents = encoder.encode(images * 2 - 1).latents
    assert float(latents.abs().min()) > 1e-5  # else rounding could change a sign
    # A bit is a sign, and the first channel is the highest bit.
    signs = latents > 0
    codes = ours.encode(images)
    assert torch.equal(codes.flatten(), (flat(signs) * powers).sum(dim=1))
    assert codes.unique().numel() > 5
    picture = decoder.decoder(decoder.post_quant_conv(signs * 2.0 - 1))
    vectors = ours.quantizer.decode(codes).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.to_images(vectors) * 2 - 1, picture, atol=1e-4, rtol=0)
    return ours


def shorten(levels: Any, blocks: tuple[int, ...]) -> None:
    """Leaves so many residual blocks in each level of one half of a VQModel."""
    for level, count in zip(levels, blocks, strict=True):
        del level.resnets[count:]


@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_codes_and_pictures_of_show_o_follow_its_rule(
    size: tuple[int, int], vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    encoder = vq_model(channels=(32, 64, 64), latent=6, width=6)
    decoder = vq_model(channels=(32, 32, 64), latent=6, width=6)
    shorten(encoder.encoder.down_blocks, (2, 1, 2))
    shorten(decoder.decoder.up_blocks, (3, 2, 1))
    config = check_show_o(encoder, decoder, taming_tensors, folder=tmp_path, size=size).config
    assert (config.code_choice, config.down_blocks, config.up_blocks) == ("lfq", (2, 1, 2), (1, 2, 3))
    assert (config.channels, config.up_channels) == ((32, 64, 64), (32, 32, 64))


@pytest.mark.slow
def test_codes_and_pictures_of_show_o_follow_its_rule_at_published_sizes(
    vq_model: Any, taming_tensors: Callable[[nn.Module], Tensors], tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"latent": 13, "width": 13, "codes": 8192}
    encoder = vq_model(channels=(128, 256, 256, 512, 512), blocks=4, **shape)
    decoder = vq_model(channels=(128, 128, 256, 256, 512), blocks=3, **shape)
    shorten(encoder.encoder.down_blocks, (4, 3, 4, 3, 4))
    shorten(decoder.decoder.up_blocks, (3, 4, 3, 4, 4))
    check_show_o(encoder, decoder, taming_tensors, folder=tmp_path, size=(64, 64))


def tiny_tensors(family: str = "taming", **changes: Any) -> Tensors:
    """The tensors of a tiny tokenizer under the names of a family."""
    shape: dict[str, Any] = {"num_codes": 16, "code_width": 4, "channels": (32, 32), "blocks_per_level": 1}
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**(shape | {"middle_attention": True} | changes)))
    names = {name: FAMILIES[family].name(name, 2) for name in tokenizer.state_dict() if name != "quantizer.bias"}
    return {theirs: tokenizer.state_dict()[name].clone() for name, theirs in names.items()}


def refused(tensors: Tensors, *, family: str = "taming", config: dict[str, Any] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_tensors(tensors, family=FAMILIES[family], config=config, source="file")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def test_what_was_converted_is_saved_and_opened_as_our_own(tmp_path: Path) -> None:
    save_file(tiny_tensors(), tmp_path / "their.safetensors")
    tokenizer = convert_image_tokenizer(tmp_path / "their.safetensors")
    save_image_tokenizer(tmp_path / "ours", tokenizer)
    opened, _ = load_image_tokenizer(tmp_path / "ours")
    assert opened.config == tokenizer.config
    assert codes_digest(opened) == codes_digest(tokenizer)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(opened.decode(opened.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_halves_are_widened() -> None:
    halves = {name: tensor.half() for name, tensor in tiny_tensors().items()}
    tokenizer = from_tensors(halves, family=FAMILIES["taming"], source="file")
    assert {tensor.dtype for tensor in tokenizer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("family", ["taming", "diffusers", "llamagen"])
@pytest.mark.parametrize(
    "name", ["decoder.up.0.block.1.conv2.weight", "encoder.mid.attn_1.q.bias", "decoder.norm_out.bias"]
)
def test_a_missing_tensor_is_named_as_in_the_file(family: str, name: str) -> None:
    tensors = tiny_tensors(family)
    theirs = FAMILIES[family].name(name, 2)
    del tensors[theirs]
    assert refused(tensors, family=family) == (
        f"file does not fit its family: missing {theirs}; choose another family or file"
    )


@pytest.mark.parametrize("family", ["taming", "diffusers", "llamagen"])
def test_an_unknown_tensor_is_named(family: str) -> None:
    tensors = tiny_tensors(family) | {"decoder.extra.weight": torch.zeros(1)}
    assert "unknown decoder.extra.weight;" in refused(tensors, family=family)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoder.mid.block_1.conv1.weight", torch.zeros(32, 32, 1, 1), "must be [32, 32, 3, 3], got [32, 32, 1, 1]"),
        ("decoder.mid.block_1.conv1.bias", torch.full((32,), float("nan")), "holds NaN or infinity"),
        ("decoder.norm_out.bias", torch.ones(32, dtype=torch.int64), "must hold fp32, fp16 or bf16, got torch.int64"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(name: str, value: Tensor, message: str) -> None:
    assert f"{name} {message}; choose another" in refused(tiny_tensors() | {name: value})


def test_many_differences_are_counted() -> None:
    message = refused({name: tensor for name, tensor in tiny_tensors().items() if "decoder.mid" not in name})
    assert "and 23 more" in message  # 26 tensors: two blocks of eight, attention of ten


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_type": "spatial"}, "file: norm_type must be 'group', got 'spatial'; use another tokenizer"),
        ({"act_fn": "gelu"}, "file: act_fn must be 'silu', got 'gelu'; use another tokenizer"),
        ({"norm_num_groups": "8"}, "file: norm_num_groups must be a number from 1, got '8'; mend config.json"),
        ({"norm_num_groups": 24}, "file cannot be an image tokenizer of ours: image_tokenizer.channels must be mult"),
    ],
)  # fmt: skip
def test_a_configuration_that_we_cannot_follow_is_refused(config: dict[str, Any], message: str) -> None:
    assert refused(tiny_tensors("diffusers"), family="diffusers", config=config).startswith(message)


def test_an_average_that_is_missing_is_named() -> None:
    stored = averaged(tiny_tensors(blocks_per_level=4))
    del stored["model_ema.quant_convweight"]
    assert refused(stored, family="ibq").startswith("file must hold the average of quant_conv.weight, got other")


class Callback:
    """What a training framework leaves in its checkpoints."""

    ran = False

    def __setstate__(self, state: object) -> None:
        Callback.ran = True


class Trap:
    """A pickle that runs something when it is opened."""

    def __init__(self, call: Any, argument: str) -> None:
        self.call = call
        self.argument = argument

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


def test_objects_beside_the_weights_are_never_made(tmp_path: Path) -> None:
    callback = Callback()
    callback.best = 3.0  # type: ignore[attr-defined]
    torch.save({"state_dict": tiny_tensors(), "callbacks": {Callback: callback}}, tmp_path / "last.ckpt")
    tensors = read_weights(tmp_path / "last.ckpt")
    assert tensors.keys() == tiny_tensors().keys()
    assert not Callback.ran
    with pytest.raises(Exception, match="Callback"):  # nothing stays allowed
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert vars(Placeholder(1, 2)) == {}


@pytest.mark.parametrize("where", ["beside", "as a tensor"])
@pytest.mark.parametrize("call", [os.system, eval], ids=["shell", "eval"])
def test_a_pickle_that_would_run_something_does_not(call: Any, where: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "trap.ckpt", tmp_path / "ran"
    trap = Trap(call, f"touch {mark}" if call is os.system else f"open({str(mark)!r}, 'w').close()")
    content = {"state_dict": tiny_tensors(), "trap": trap} if where == "beside" else {"conv.weight": trap}
    torch.save(content, file)
    if call is eval and where == "beside":
        assert read_weights(file).keys() == tiny_tensors().keys()
    else:
        message = r"trap\.ckpt must (be readable as weights alone, got: .*save_file|hold a mapping of tensors, .*else)$"
        with pytest.raises(CheckpointError, match=message):
            read_weights(file)
    assert not mark.exists()


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"must hold a mapping of tensors, .* got something else"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        convert_image_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_weights_of_a_folder_are_found(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold a file of weights \(.*\), got none"):
        find_weights(tmp_path)
    for name in ("last.ckpt", "b.safetensors", "vqvae/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_weights(tmp_path) == tmp_path / "b.safetensors"  # before pickles, and before parts of a pipeline
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ModelError, match=r"must hold one file of weights, got a.safetensors, b.safetensors; name the"):
        find_weights(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert find_weights(tmp_path) == tmp_path / "diffusion_pytorch_model.safetensors"
    assert find_weights(tmp_path / "last.ckpt") == tmp_path / "last.ckpt"
    (tmp_path / "weights.h5").touch()
    for wrong in ("weights.h5", "nowhere"):
        with pytest.raises(ModelError, match=wrong):
            find_weights(tmp_path / wrong)


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_damaged_config_is_one_line(content: str, tmp_path: Path) -> None:
    save_file(tiny_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|must hold a JSON object)"):
        convert_image_tokenizer(tmp_path)


def test_an_unknown_family_is_one_line_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        convert_image_tokenizer(tmp_path, family="vqgan")
    assert str(caught.value).startswith("family must be one of those known, got 'vqgan'; known are openmuse (")
    assert all(name in str(caught.value) for name in FAMILIES)
