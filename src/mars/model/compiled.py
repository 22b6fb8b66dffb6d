"""A step of drawing as one compiled function of tensors, for a GPU: there, starting kernels takes longer than they run.

`torch.compile(mode="reduce-overhead")` records it as a CUDA graph for each number of rows. Shapes stay the same from
step to step, as attention looks at the whole cache through a mask, and nothing is read back. It has not been run on a
GPU; tests compile it for the CPU, where it is not quicker than the kernel (`decoding.py`).

Letters: L layers with a visual expert, B rows, T new positions, S columns, G key/value heads, E head width.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from mars.errors import ModelError
from mars.model.cache import StaticCache
from mars.model.layers import Norm
from mars.model.semvie import SemVIELayer
from mars.sequence.layout import Modality

LEAST_CAPABILITY = (7, 0)
"""Of a GPU that Triton compiles for."""


class _Columns:
    """Where the keys and values of new positions go: places that are tensors, so that no shape depends on them."""

    def __init__(self, store_2LBGSE: Tensor, places: dict[int, int], columns_BT: Tensor) -> None:
        self.store = store_2LBGSE
        self.places = places
        self.columns = columns_BT
        self.rows = torch.arange(len(columns_BT), device=columns_BT.device)[:, None]

    def extend(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """As `StaticCache.extend`, but for what is returned: all columns, used or not."""
        keys, values = self.store[:, self.places[layer], : len(k_BGTE)]
        keys[self.rows, :, self.columns] = k_BGTE.transpose(1, 2)
        values[self.rows, :, self.columns] = v_BGTE.transpose(1, 2)
        return keys, values


class StepFunction:
    """The layers that image positions run through, as a function of tensors alone."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, SemVIELayer) and layer.visual is not None]

    def __call__(
        self,
        x_BTD: Tensor,
        rotary: Tensor,
        columns_BT: Tensor,
        store_2LBGSE: Tensor,
        places: dict[int, int],
        block: int,
    ) -> Tensor:
        """New positions of each row through all layers, (B, T, D); their keys and values go into the store.

        Args:
            columns_BT: where they lie in the store; each sees what lies before its block, and the whole of that.
        """
        blocks_T = torch.arange(columns_BT.shape[1], device=columns_BT.device) // block + 1
        ends_BT = columns_BT[:, :1] + blocks_T * block
        mask = (torch.arange(store_2LBGSE.shape[4], device=columns_BT.device) < ends_BT[..., None])[:, None]
        cache = _Columns(store_2LBGSE, places, columns_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, Modality.IMAGE, cache=cache, rotary=rotary, mask=mask)
        return x_BTD


class CompiledSteps:
    """Runs steps through a compiled `StepFunction`, for any cache of a model.

    Raises:
        ModelError: if nothing can be compiled for the device.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        check_compiles(device)
        self.graphs = device.type == "cuda"
        step = StepFunction(layers)
        self.step = cast(Callable[..., Tensor], torch.compile(step.__call__, mode="reduce-overhead", fullgraph=True))

    def run(self, x_BTD: Tensor, rotary: Tensor, cache: StaticCache, *, block: int, norm: Norm) -> Tensor:
        """Hidden states of the new positions of each row, through all layers and a last norm; the cache has begun their
        columns.
        """
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the step before returned is not needed any more
            torch._dynamo.mark_static_address(cache.store)  # or a graph would read a copy
        found = self.step(x_BTD, rotary, cache.columns[True], cache.store, cache.places, block)
        return cast(Tensor, norm(found))


def check_compiles(device: torch.device) -> None:
    """Raises ModelError where steps cannot be compiled."""
    if device.type != "cuda":
        return
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ModelError("compiled steps need Triton and a GPU of compute capability 7.0; draw without them")
