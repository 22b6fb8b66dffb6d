"""Steps of drawing for a GPU, which is not here: what can be shown without one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mars.errors import ModelError
from mars.generation.batch import Batch, new_picture
from mars.generation.jacobi import new_batch
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.model import compiled
from mars.model.cache import Prefix, StaticCache
from mars.model.compiled import CompiledSteps, StepFunction, check_compiles
from mars.model.layers import Norm
from mars.model.transformer import MarsTransformer, read_prefixes

FREE = (1,)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "unique2", "lift_fresh")
"""Operators that a GPU must be waited for, or that make tensors of Python's numbers."""
WAITS_IN_PYTHON = {
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__int__, Tensor.__float__, Tensor.__bool__,
    Tensor.__index__, Tensor.__contains__, torch.tensor,
}  # fmt: skip


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in WAITS, f"a step waits for {func}"
        if name in ("index", "index_put", "index_put_"):  # the places of a mask would be counted
            assert all(one is None or one.dtype is torch.long for one in args[1]), f"{func} by a mask"
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert func not in WAITS_IN_PYTHON, f"a step waits for {func}"
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, list) for one in places), "places are sent to the GPU at every step"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read_back() -> Iterator[None]:
    """Raises where a GPU would have to be waited for, or sent Python's numbers."""
    with _Operators(), _Calls():
        yield


class Uncompiled(CompiledSteps):
    """The step function as it is."""

    def __init__(self, transformer: MarsTransformer) -> None:
        self.graphs = False
        self.step = StepFunction(transformer.layers)


def requests(**sampling: Any) -> list[DrawRequest]:
    return [
        DrawRequest(
            prompt=prompt, free=FREE, grid=(3, 4), seed=seed, sampling=Sampling(**{"guidance": scale, **sampling})
        )
        for seed, (prompt, scale) in enumerate([((1, 40, 41, 42), 2.0), ((1, 50), 1.0), ((1, 60, 61), 3.0)])
    ]


def upscaled(**sampling: Any) -> list[DrawRequest]:
    low = torch.tensor([[1, 2, 3]])
    return [
        DrawRequest(
            prompt=(1, 40), free=FREE, grid=(2, 6), seed=0, sampling=Sampling(**sampling), low=low, side=2
        )
    ]  # fmt: skip


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**({**pocket, "max_grid": 8} if request.param == "pocket" else {}), low_input=True)


@torch.inference_mode()
def begun(transformer: MarsTransformer, wanted: Sequence[DrawRequest]) -> Batch:
    """A batch of pictures that are about to be drawn."""
    batch = new_batch(transformer, wanted[0])
    for request in wanted:
        prefixes = read_prefixes(transformer, request.texts)
        if request.low is not None:  # what a prefix says does not matter here
            prefixes = [_longer(one, request.low.numel() + 1) for one in prefixes]
        batch.joining.append(new_picture(transformer, request, prefixes=prefixes))
    batch.join()
    return batch


def _longer(prefix: Prefix, more: int) -> Prefix:
    keys, values = (
        torch.cat([one, one[:, :, :1].expand(-1, -1, more, -1)], dim=2) for one in (prefix.keys, prefix.values)
    )
    return Prefix(keys=keys, values=values, last_hidden=prefix.last_hidden)


@torch.inference_mode()
def drawn(transformer: MarsTransformer, wanted: Sequence[DrawRequest]) -> Tensor:
    batch = begun(transformer, wanted)
    while min(picture.done for picture in batch.pictures) < 12:
        batch.step()
    return batch.codes_PN


@pytest.mark.parametrize("make", [requests, upscaled])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_step_function_draws_what_the_layers_draw(
    transformer: MarsTransformer, make: Callable[..., list[DrawRequest]], temperature: float
) -> None:
    wanted = drawn(transformer, make(temperature=temperature))
    transformer.steps = Uncompiled(transformer)
    assert torch.equal(drawn(transformer, make(temperature=temperature)), wanted)


def test_a_window_and_an_early_stop_are_drawn_too(transformer: MarsTransformer) -> None:
    sampling = {"temperature": 0.0, "window": 3, "guidance_stop": 0.5}
    wanted = drawn(transformer, requests(**{**sampling, "window": 1}))
    transformer.steps = Uncompiled(transformer)
    found = drawn(transformer, requests(**sampling)[:1])
    assert torch.equal(found[0, :12], wanted[0])


@pytest.mark.parametrize("way", ["layers", "step function"])
@pytest.mark.parametrize(
    ("make", "sampling"),
    [
        (requests, {}),
        (requests, {"top_k": 5, "top_p": 0.9, "candidates": 2}),
        (requests, {"temperature": 0}),
        (requests, {"guidance_stop": 0.5}),
        (upscaled, {"guidance": 2.0}),
    ],
)
@torch.inference_mode()
def test_nothing_is_read_back_during_a_step(
    transformer: MarsTransformer, make: Callable[..., list[DrawRequest]], sampling: dict[str, Any], way: str
) -> None:
    if way == "step function":
        transformer.steps = Uncompiled(transformer)
    batch = begun(transformer, make(**sampling))
    with nothing_read_back():
        batch.step()
        batch.step()


@torch.inference_mode()
def test_what_reads_back_is_noticed() -> None:
    numbers = torch.arange(3)
    for reading in (
        lambda: int(numbers[0]), numbers.tolist, lambda: numbers[numbers > 1], lambda: numbers[[0, 1]],
        lambda: torch.tensor([1]), lambda: bool((numbers > 0).any()), numbers.nonzero,
    ):  # fmt: skip
        with pytest.raises(AssertionError), nothing_read_back():
            reading()


def test_shapes_and_places_do_not_change_from_step_to_step(transformer: MarsTransformer) -> None:
    seen = []

    class Watched(Uncompiled):
        def run(self, x_BTD: Tensor, rotary: Tensor, cache: StaticCache, *, block: int, norm: Norm) -> Tensor:
            seen.append((x_BTD.shape, rotary.shape, cache.columns[True].shape, cache.store.data_ptr(), block))
            return super().run(x_BTD, rotary, cache, block=block, norm=norm)

    transformer.steps = Watched(transformer)
    drawn(transformer, requests())
    assert len(seen) == 12
    assert len(set(seen)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_steps_choose_the_same_codes(
    build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> None:
    transformer = build_tiny(**pocket)  # a minute or more, most of it once for the compiler
    wanted = drawn(transformer, requests())
    transformer.compile_steps()
    assert torch.equal(drawn(transformer, requests()), wanted)


def test_a_gpu_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"compiled steps need Triton and a GPU of compute capability 7\.0"):
        check_compiles(torch.device("cuda"))
    check_compiles(torch.device("cpu"))
