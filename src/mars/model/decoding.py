"""A step of drawing in one call of the kernel: one position of each row through all layers of the visual expert.

PyTorch takes some twenty operators a layer for it, each of a few microseconds: more than reading the weights takes when
the model is small, and a fifth of it at 7B in 4 bits. Where all layers are quantized and the kernel is there, this is
what `MarsTransformer` runs instead; the mathematics are the same, rounding aside.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mars.model.cache import StaticCache
from mars.model.kernel import Kernel, Layer, Step, find_kernel
from mars.model.quantized import KERNEL_ROWS, QuantizedLinear
from mars.model.semvie import SemVIELayer
from mars.sequence.layout import Modality


class Decoder:
    """The layers that image positions run through, as the kernel sees them, beside one cache.

    It holds addresses: the layers and the cache must stay as they are.
    """

    def __init__(self, kernel: Kernel, layers: list[SemVIELayer], cache: StaticCache) -> None:
        self.kernel = kernel
        self.layers = layers
        self.addresses = (Layer * len(layers))(*(_describe(layer, cache) for layer in layers))
        heads, kv_heads, head_width = layers[0].language.heads
        eps = layers[0].norms_of(layers[0].expert(Modality.IMAGE))["ffn_norm"].eps
        self.step = Step(heads=heads, kv_heads=kv_heads, head_width=head_width, size=cache.size, eps=eps)

    def run(self, x_B1D: Tensor, rotary: Tensor, cache: StaticCache) -> Tensor:
        """Hidden states of one position of each row, through all layers; the cache has begun its column."""
        assert cache.lengths_B is not None
        x_B1D = x_B1D.clone(memory_format=torch.contiguous_format)
        rotary = rotary.contiguous()
        step = self.step
        step.rows, _, step.width = x_B1D.shape
        step.longest = cache.most[True]
        step.used = cache.lengths_B.data_ptr()
        step.rotary = rotary.data_ptr()
        self.kernel.decode(x_B1D, self.addresses, step)
        return x_B1D


def build_decoder(layers: Iterable[nn.Module], cache: StaticCache) -> Decoder | None:
    """A decoder, or None if there is no kernel or these layers and this cache are not what it takes."""
    visual = [layer for layer in layers if isinstance(layer, SemVIELayer) and layer.visual is not None]
    on_cpu = cache.store.dtype is torch.float32 and cache.store.device.type == "cpu"
    if not on_cpu or cache.store.shape[2] > KERNEL_ROWS:
        return None
    if not all(isinstance(linear, QuantizedLinear) for layer in visual for linear in _linears(layer).values()):
        return None
    kernel = find_kernel()
    return None if kernel is None else Decoder(kernel, visual, cache)


def _linears(layer: SemVIELayer) -> dict[str, nn.Module]:
    expert = layer.expert(Modality.IMAGE)
    names = ("q", "k", "v", "gate", "up", "down")
    return {name: getattr(expert, f"{name}_proj") for name in names} | {"o": layer.output_of(expert)}


def _describe(layer: SemVIELayer, cache: StaticCache) -> Layer:
    keys, values = cache.store[:, cache.places[layer.index]]
    found = Layer(keys=keys.data_ptr(), values=values.data_ptr())
    for name, linear in _linears(layer).items():
        assert isinstance(linear, QuantizedLinear)
        setattr(found, name, linear.address())
        if linear.bias is not None:
            setattr(found, f"{name}_bias", linear.bias.data_ptr())
    for name, norm in layer.norms_of(layer.expert(Modality.IMAGE)).items():
        assert norm.weight.dtype is torch.float32
        setattr(found, name, norm.weight.data_ptr())
    return found
