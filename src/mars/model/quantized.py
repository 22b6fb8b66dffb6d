"""Weights of 8 or 4 bits: a linear layer that reads an eighth of the bytes, which is what drawing waits for.

Weights are rounded in blocks of 32 inputs, each with its own fp16 scale: 8.5 or 4.5 bits a weight. Codes are symmetric,
their zero at 128 or 8; scales are chosen as llama.cpp's Q8_0 and Q4_0 choose them. Products go through our kernel
(`quantized.c`, which also rounds activations to 8 bits), or, on a machine without it, through PyTorch's with the
weights made whole again.

`HalfWeight` is for models that are kept in fp32: a copy of a weight in 16 bits that drawing reads instead, in half the
time. Activations stay in fp32, or in 24 bits.

Letters: O outputs, I inputs, T tiles of 16 outputs, K blocks of 32 inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.errors import ModelError
from mars.model.kernel import KINDS, TILE, Weight, find_kernel

Bits = Literal[4, 8]

BLOCK, QUARTER = 32, 4

MOST_INPUTS = 65536
"""Of a weight of 16 bits: their products are summed in 32 bits (`amx.c`)."""


def check_fits(inputs: int, *, name: str) -> None:
    """Raises ModelError for a weight whose inputs blocks do not divide."""
    if inputs % BLOCK:
        raise ModelError(
            f"{name}: weights of 8 or 4 bits need a multiple of {BLOCK} inputs, got {inputs}; choose another width, "
            "or fp32"
        )


@torch.no_grad()
def quantize(weight_OI: Tensor, *, bits: Bits) -> tuple[Tensor, Tensor]:
    """Rounds a weight. Returns codes uint8 (T, K, 64 * bits) in the kernel's order, and scales fp16 (T, K, 16).

    The last tile is filled up with outputs of zeros.

    Raises:
        ModelError: if blocks do not divide the inputs.
    """
    outputs, inputs = weight_OI.shape
    check_fits(inputs, name="weight")
    kernel = find_kernel()
    if kernel is None or weight_OI.dtype not in KINDS or weight_OI.device.type != "cpu":
        return quantize_slowly(weight_OI, bits=bits)
    codes = torch.empty(-(-outputs // TILE), inputs // BLOCK, 64 * bits, dtype=torch.uint8)
    scales = torch.empty(*codes.shape[:2], TILE, dtype=torch.float16)
    kernel.quantize(weight_OI.contiguous(), codes, scales, bits=bits)
    return codes, scales


@torch.no_grad()
def quantize_slowly(weight_OI: Tensor, *, bits: Bits) -> tuple[Tensor, Tensor]:
    """`quantize` in PyTorch's operators: the same, in six times as long and with several copies."""
    outputs, inputs = weight_OI.shape
    zero = 1 << (bits - 1)
    blocks = F.pad(weight_OI.float(), (0, 0, 0, -outputs % TILE)).reshape(-1, inputs // BLOCK, BLOCK)
    if bits == 4:  # the largest value becomes -8, whatever its sign: sixteen steps instead of fifteen
        largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
        scales = (largest / -zero).half()
    else:
        scales = (blocks.abs().amax(dim=2, keepdim=True) / (zero - 1)).half()
    steps = scales.float()
    inverse = torch.where(steps == 0, 0.0, 1 / steps)
    codes = (blocks * inverse).round_().clamp_(-zero, zero - 1).add_(zero).to(torch.uint8)
    # (O, K, 32) -> (T, K, quarter, 16 outputs, 4 inputs)
    tiles = codes.view(-1, TILE, inputs // BLOCK, BLOCK // QUARTER, QUARTER).permute(0, 2, 3, 1, 4)
    if bits == 4:
        tiles = tiles[:, :, :4] | tiles[:, :, 4:] << 4
    scales = scales.view(-1, TILE, inputs // BLOCK).transpose(1, 2)
    return tiles.reshape(*scales.shape[:2], -1).contiguous(), scales.contiguous()


@torch.no_grad()
def dequantize(codes: Tensor, scales: Tensor, *, bits: Bits) -> Tensor:
    """The weight (O, I) in fp32 that `quantize` stands for, with its filler."""
    tiles, blocks, _ = codes.shape
    parts = codes.view(tiles, blocks, -1, TILE, QUARTER)
    if bits == 4:
        parts = torch.cat([parts & 15, parts >> 4], dim=2)
    values = (parts.float() - (1 << (bits - 1))) * scales.float()[:, :, None, :, None]
    return values.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, blocks * BLOCK)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept in 8 or 4 bits: for inference only, on a CPU."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias: Tensor | None = None, *, bits: Bits) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.bits = bits
        codes, scales = quantize(weight_OI, bits=bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())

    @property
    def num_bytes(self) -> int:
        """What one pass reads."""
        return self.codes.numel() + 2 * self.scales.numel()

    def whole(self) -> Tensor:
        """The weight (O, I) in fp32."""
        return dequantize(self.codes, self.scales, bits=self.bits)[: self.out_features]

    def address(self) -> Weight:
        """Where the kernel finds the weight, as long as the layer lives."""
        outputs = len(self.codes) * TILE
        return Weight(self.codes.data_ptr(), self.scales.data_ptr(), outputs, self.in_features, self.bits)

    def finish(self, product: Tensor) -> Tensor:
        """The kernel's product without the last tile's filler, with the bias."""
        if product.shape[-1] != self.out_features:
            product = product[..., : self.out_features]
        return product if self.bias is None else product + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in fp32."""
        return multiply(x, [self])[0]


def multiply(x: Tensor, linears: Sequence[QuantizedLinear]) -> list[Tensor]:
    """The products (..., out) of one x (..., in) with several layers, in fp32: x is rounded only once."""
    x = x.float().contiguous()
    rows = x.numel() // linears[0].in_features
    kernel = find_kernel()
    if kernel is None:
        return [F.linear(x, linear.whole(), linear.bias) for linear in linears]
    products = [x.new_empty(*x.shape[:-1], len(linear.codes) * TILE) for linear in linears]
    kernel.multiply(x, rows, [linear.address() for linear in linears], products)
    return [linear.finish(product) for linear, product in zip(linears, products, strict=True)]


@torch.no_grad()
def quantize_linears(module: nn.Module, *, bits: Bits, where: str = "model") -> None:
    """Replaces every `nn.Linear` inside a module by a quantized one; each is let go before the next is made.

    Raises:
        ModelError: if blocks do not divide a weight's inputs; nothing is replaced then.
    """
    linears = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for name, linear in linears:
        check_fits(linear.in_features, name=f"{where}.{name}")
    while linears:
        name, linear = linears.pop()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, QuantizedLinear(linear.weight, linear.bias, bits=bits))
        del linear


@dataclass(frozen=True)
class HalfWeight:
    """A copy of a weight in 16 bits, in the kernel's order: fp16, or where the processor multiplies tiles of bytes
    (AMX) integers with one scale for each output (`amx.c`): within a 65,024th of the largest weight of its output,
    closer to most weights of fp32 than fp16 is, but not equal to weights that are saved in fp16.
    """

    BYTES: ClassVar[int] = 2
    """Of a weight."""
    codes: Tensor
    """(T, bytes of a tile) uint8; the last tile is filled up with zeros."""
    scales: Tensor
    """(T, 16) fp32; ones for fp16."""
    inputs: int

    @classmethod
    @torch.no_grad()
    def pack(cls, weight_OI: Tensor) -> "HalfWeight":
        """Copies a weight (O, I).

        Raises:
            ModelError: for more inputs than integers of 32 bits can sum up.
        """
        inputs = weight_OI.shape[1]
        if inputs > MOST_INPUTS:
            raise ModelError(
                f"a weight of 16 bits has at most {MOST_INPUTS:,} inputs, got {inputs}; "
                "open the model with precision fp32"
            )
        kernel = find_kernel()
        assert kernel is not None, "copies in 16 bits are only made where there is a kernel"
        return cls(*kernel.pack(weight_OI.float().contiguous()), inputs)

    def address(self) -> Weight:
        """Where the kernel finds it, as long as it lives."""
        return Weight(self.codes.data_ptr(), self.scales.data_ptr(), len(self.codes) * TILE, self.inputs, 16)

    def multiply(self, x: Tensor) -> Tensor:
        """The product (..., outputs with filler) of x (..., I), in fp32."""
        kernel = find_kernel()
        assert kernel is not None, "copies in 16 bits are only made where there is a kernel"
        x = x.float().contiguous()
        product = x.new_empty(*x.shape[:-1], len(self.codes) * TILE)
        kernel.multiply(x, x.numel() // x.shape[-1], [self.address()], [product])
        return product
