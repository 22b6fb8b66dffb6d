"""The VQ-GAN: images to codes, codes to images. Fully convolutional, with taming-transformers' layer names.

    encode   (B, 3, height, width) in 0..1  ->  codes (B, R, C), R = height / factor, C = width / factor
    decode   codes (B, R, C)                ->  (B, 3, height, width) in 0..1

Letters: B batch, R rows, C columns, Z code width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.errors import ImageError
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.quantizer import Quantizer


class PlaceNorm(nn.LayerNorm):
    """Normalises the channels of each place alone: (B, channels, h, w), the same out."""

    def forward(self, x: Tensor) -> Tensor:
        """Layer norm over the second dimension (Ba et al. 2016)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(config: ImageTokenizerConfig, channels: int) -> nn.Module:
    """The norm that a configuration asks for; both kinds have `weight` and `bias` (channels,)."""
    if config.norm == "place":
        return PlaceNorm(channels, eps=1e-6)
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip connection."""

    def __init__(self, config: ImageTokenizerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = make_norm(config, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = make_norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = self.nin_shortcut(x) + hidden
        return out


class AttnBlock(nn.Module):
    """Single-head self-attention over all places of a feature map."""

    def __init__(self, config: ImageTokenizerConfig, channels: int) -> None:
        super().__init__()
        self.norm = make_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w), the same out."""
        hidden = self.norm(x)
        q, k, v = (conv(hidden).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.proj_out(mixed)
        return x + out


class Downsample(nn.Module):
    """Halves a feature map; pads right and below only, as taming does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, h / 2, w / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles a feature map by repetition, then smooths."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, 2 h, 2 w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where asked; a resampler goes where it is set."""

    def __init__(
        self, config: ImageTokenizerConfig, inputs: int, outputs: int, *, blocks: int, attention: bool
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(ResnetBlock(config, a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(config, outputs) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h', w')."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        out: Tensor = self.upsample(self.downsample(x))
        return out


class Middle(nn.Module):
    """The coarsest resolution: block, optional attention, block."""

    def __init__(self, config: ImageTokenizerConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels) if config.middle_attention else nn.Identity()
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w), the same out."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Pixels to latent vectors, from which `quant_conv` makes code vectors."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = config.channels
        self.stem = nn.PixelUnshuffle(config.patch)
        self.conv_in = nn.Conv2d(3 * config.patch**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(channels):
            inputs = channels[max(index - 1, 0)]
            attention = index in config.attention_levels
            level = Level(config, inputs, width, blocks=config.down_blocks[index], attention=attention)
            if index < len(channels) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(config, channels[-1])
        self.norm_out = make_norm(config, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) in the pixel range -> (B, latent channels, R, C)."""
        x = self.conv_in(self.stem(images))
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latent vectors to pixels. `up[0]` is the finest level, as in taming."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = config.up_channels
        self.conv_in = nn.Conv2d(config.latent, channels[-1], 3, padding=1)
        self.mid = Middle(config, channels[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(channels):
            inputs = channels[min(index + 1, len(channels) - 1)]
            attention = index in config.attention_levels
            level = Level(config, inputs, width, blocks=config.up_blocks[index], attention=attention)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = make_norm(config, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3 * config.patch**2, 3, padding=1)
        self.unstem = nn.PixelShuffle(config.patch)

    @property
    def last_weight(self) -> Tensor:
        """The weights of the last layer, where the adversary's weight is balanced."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, latent channels, R, C) -> (B, 3, height, width) in the pixel range."""
        x = self.mid(self.conv_in(vectors))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.unstem(self.conv_out(F.silu(self.norm_out(x))))
        return out


class ImageTokenizer(nn.Module):
    """Images to codes and back."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent, config.code_width, 1)
        self.quantizer = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent, 1)
        self.decoder = Decoder(config)

    def to_vectors(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> vectors before quantization (B, Z, R, C).

        Raises:
            ImageError: if a side is no multiple of the factor.
        """
        height, width, factor = *images.shape[-2:], self.config.factor
        if height % factor or width % factor or not height or not width:
            raise ImageError(f"image sides must be multiples of {factor}, got {width}x{height}")
        low, high = self.config.pixel_range
        vectors: Tensor = self.quant_conv(self.encoder(images * (high - low) + low))
        return vectors

    def to_images(self, vectors: Tensor) -> Tensor:
        """Code vectors (B, Z, R, C) -> images (B, 3, height, width), about 0..1 but not clipped."""
        low, high = self.config.pixel_range
        pixels: Tensor = self.decoder(self.post_quant_conv(vectors))
        return (pixels - low) / (high - low)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in 0..1 -> codes (B, R, C) int64."""
        vectors = self.to_vectors(images)
        batch, width, rows, columns = vectors.shape
        flat_NZ = vectors.permute(0, 2, 3, 1).reshape(-1, width)
        return self.quantizer.encode(flat_NZ).view(batch, rows, columns)

    def decode(self, codes_BRC: Tensor) -> Tensor:
        """Codes (B, R, C) -> images (B, 3, height, width) in 0..1."""
        return self.to_images(self.quantizer.decode(codes_BRC).permute(0, 3, 1, 2)).clamp(0, 1)


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images through codes and back: (images, codes), without a graph."""
    codes = tokenizer.encode(images)
    return tokenizer.decode(codes), codes
