"""A step of drawing in one call of the kernel: a few positions of each row through all layers of the visual expert.

PyTorch takes some twenty operators a layer for it, each of a few microseconds: more than reading the weights takes when
the model is small, and a fifth of it at 7B in 4 bits. Where all layers are quantized, or have copies in 16 bits, and
the kernel is there, this is what `MarsTransformer` runs instead; the mathematics are the same, rounding aside.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mars.errors import ModelError
from mars.model.cache import StaticCache
from mars.model.kernel import Kernel, Layer, Step, find_kernel
from mars.model.layers import Norm
from mars.model.quantized import HalfWeight, QuantizedLinear
from mars.model.semvie import SemVIELayer
from mars.sequence.layout import Modality

MOST_POSITIONS = 128
"""Of all rows in one call of the kernel, whose threads each keep them all; a row with more is done layer by layer."""


class HalfWeights:
    """Copies in 16 bits of the weights that drawing reads, made at first use and again when a weight has changed."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[tuple[int, int], HalfWeight]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the copies: another processor wants others."""
        return {"_copies": {}}

    def of(self, name: str, linear: nn.Linear) -> HalfWeight:
        """The copy of a layer's weight; `name` tells it from others.

        Raises:
            ModelError: if a value is beyond the range of fp16.
        """
        weight = linear.weight
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        found = self._copies.get(name)
        if found is None or found[0] != state:
            largest = float(torch.linalg.vector_norm(weight.detach(), ord=torch.inf))
            if not largest <= torch.finfo(torch.float16).max:
                raise ModelError(
                    f"{name}: weights must lie in the range of fp16, up to 65,504 in size, got {largest:.3g}; "
                    "open the model with precision fp32"
                )
            self._copies[name] = found = state, HalfWeight.pack(weight)
        return found[1]


class Decoder:
    """The layers that image positions run through, as the kernel sees them, beside one cache.

    It holds addresses: the layers and the cache must stay as they are.
    """

    def __init__(
        self, kernel: Kernel, layers: list[SemVIELayer], cache: StaticCache, halves: HalfWeights | None
    ) -> None:
        self.kernel = kernel
        self.layers = layers
        self.halves = halves
        self.addresses = (Layer * len(layers))(*(_describe(layer, cache, halves) for layer in layers))
        heads, kv_heads, head_width = layers[0].language.heads
        eps = layers[0].norms_of(layers[0].expert(Modality.IMAGE))["ffn_norm"].eps
        self.step = Step(heads=heads, kv_heads=kv_heads, head_width=head_width, size=cache.size, eps=eps)

    def run(self, x_BTD: Tensor, rotary: Tensor, cache: StaticCache, *, block: int, norm: Norm) -> Tensor:
        """Hidden states of the new positions of each row, through all layers and a last norm; the cache has begun their
        columns.
        """
        assert cache.lengths_B is not None
        assert norm.weight.dtype is torch.float32
        x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
        step = self.step
        rows, step.positions, step.width = x_BTD.shape
        step.block = block
        step.longest = cache.most[True]
        step.norm, step.last_eps = norm.weight.data_ptr(), norm.eps
        at_once = MOST_POSITIONS // step.positions
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            turns = rotary[:, part].contiguous()
            step.first, step.rows = first, len(x_BTD[part])
            step.used, step.rotary = cache.lengths_B[part].data_ptr(), turns.data_ptr()
            self.kernel.decode(x_BTD[part], self.addresses, step)
        return x_BTD


def kernel_for(layers: Iterable[nn.Module], halves: HalfWeights | None, device: torch.device) -> Kernel | None:
    """The kernel, if there is one and these layers are what it takes.

    Args:
        halves: where copies of layers that are kept in fp32 are, or will be.
    """
    linears = [linear for layer in _visual(layers) for linear in _linears(layer).values()]
    if device.type != "cpu" or (halves is None and not all(isinstance(one, QuantizedLinear) for one in linears)):
        return None
    return find_kernel()


def build_decoder(layers: Iterable[nn.Module], cache: StaticCache, halves: HalfWeights | None = None) -> Decoder | None:
    """A decoder, or None without `kernel_for` these layers or with a cache that is not in fp16."""
    if cache.store.dtype is not torch.float16:
        return None
    layers = list(layers)
    kernel = kernel_for(layers, halves, cache.store.device)
    return None if kernel is None else Decoder(kernel, _visual(layers), cache, halves)


def _visual(layers: Iterable[nn.Module]) -> list[SemVIELayer]:
    return [layer for layer in layers if isinstance(layer, SemVIELayer) and layer.visual is not None]


def _linears(layer: SemVIELayer) -> dict[str, nn.Module]:
    expert = layer.expert(Modality.IMAGE)
    names = ("q", "k", "v", "gate", "up", "down")
    return {name: getattr(expert, f"{name}_proj") for name in names} | {"o": layer.output_of(expert)}


def _describe(layer: SemVIELayer, cache: StaticCache, halves: HalfWeights | None) -> Layer:
    keys, values = cache.store[:, cache.places[layer.index]]
    found = Layer(keys=keys.data_ptr(), values=values.data_ptr())
    for name, linear in _linears(layer).items():
        if isinstance(linear, QuantizedLinear):
            setattr(found, name, linear.address())
        else:
            assert isinstance(linear, nn.Linear)
            assert halves is not None
            setattr(found, name, halves.of(f"layers.{layer.index}.{name}", linear).address())
        if linear.bias is not None:
            assert linear.bias.dtype is torch.float32
            setattr(found, f"{name}_bias", linear.bias.data_ptr())
    for name, norm in layer.norms_of(layer.expert(Modality.IMAGE)).items():
        assert norm.weight.dtype is torch.float32
        setattr(found, name, norm.weight.data_ptr())
    return found
