"""How fast a model draws on this machine, beside what the machine's memory allows.

Drawing a code reads every weight of the visual expert once, whatever the number of rows. So the limit of steps per
second is bandwidth / bytes, where bandwidth is measured on the spot: the kernel's threads read memory and do nothing
with it.
"""

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import mars
from mars.checkpoint import write_json
from mars.errors import RequestError
from mars.evaluation.report import open_folder
from mars.files import whole_file
from mars.generation.sampling import Sampling
from mars.model.kernel import find_kernel
from mars.model.quantized import HalfWeight, QuantizedLinear
from mars.model.semvie import SemVIELayer
from mars.model.transformer import MarsTransformer
from mars.pipeline.drawings import Drawings, Preview
from mars.pipeline.orders import draw_order
from mars.sequence.layout import Modality

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline

PROMPTS = ("red apple", "slice of pizza", "cat face", "红苹果", "flag: France", "a blue circle", "披萨", "heart")
MOST_READ = 2**30
"""Bytes that are read to measure bandwidth, at most."""
Say = Callable[[str], None]


def speed_benchmark(
    pipe: "MarsPipeline",
    *,
    out: Path,
    batches: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
    sampling: Sampling,
    say: Say,
) -> dict[str, Any]:
    """Measures a model, warm, and writes `speed.json` and `speed.png` into a folder.

    Returns:
        seconds of a call by number of pictures (prompt, codes and pixels; medians), pictures and codes per second,
        the price of guidance, time to the first preview, and the share of the memory's limit that steps reach.

    Raises:
        RequestError: if the folder cannot be made, or a number is not positive.
    """
    if repeats < 1 or not batches or min(batches) < 1:
        raise RequestError(f"batches and repeats must be at least 1, got {list(batches)} and {repeats}")
    open_folder(out)
    plain = replace(sampling, candidates=1)
    found: dict[str, Any] = {
        "model": pipe.model.info.name,
        "precision": pipe.model.precision,
        "pixels": list(pipe.sizes[0]),
        "sampling": asdict(sampling),
        "machine": _machine(),
        "batches": [],
    }
    for count in batches:
        say(f"drawing {count} at a time")
        found["batches"].append({"pictures": count, **_batch(pipe, count, repeats=repeats, sampling=sampling)})
    say("one picture with and without guidance, and its first preview")
    guided, free = (
        _seconds(pipe, 1, repeats=repeats, sampling=replace(plain, guidance=scale))
        for scale in (max(sampling.guidance, 2.0), 1.0)
    )
    found["one candidate"] = {"guided": guided, "not guided": free, "times as long": guided / free}
    found["first preview"] = median(_first_preview(pipe, sampling, seed=seed) for seed in range(repeats))
    found["steps"] = _steps(pipe, guided=sampling.guidance != 1, repeats=repeats)
    found["resident megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _per_megabyte()
    write_json(out / "speed.json", found)
    _plot(found, out / "speed.png")
    return found


def _batch(pipe: "MarsPipeline", count: int, *, repeats: int, sampling: Sampling) -> dict[str, float]:
    seconds = _seconds(pipe, count, repeats=repeats, sampling=sampling)
    rows, columns = pipe.model.info.grids[0]
    codes = count * sampling.candidates * rows * columns
    return {"seconds": seconds, "pictures/s": count / seconds, "codes/s": codes / seconds}


def _seconds(pipe: "MarsPipeline", count: int, *, repeats: int, sampling: Sampling) -> float:
    """The median time of a call, after one to warm up."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    times = []
    for seed in range(repeats + 1):
        started = time.perf_counter()
        pipe(prompts, seed=seed, sampling=sampling)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _first_preview(pipe: "MarsPipeline", sampling: Sampling, *, seed: int) -> float:
    """Seconds from asking for a picture to seeing its first row."""
    started = time.perf_counter()
    drawings = Drawings(pipe)
    rows = pipe.model.info.grids[0][0]
    drawings.submit(draw_order(pipe, PROMPTS[0], seed=seed, sampling=sampling), previews=rows - 1)
    while drawings.busy and not any(isinstance(news, Preview) for news in drawings.step()):
        continue  # a picture of one row has none
    return time.perf_counter() - started


def bytes_per_step(transformer: MarsTransformer) -> int:
    """What a step of drawing reads of the weights: those of the visual expert's layers and of its head."""
    linears: list[nn.Module] = [transformer.visual_head]
    for layer in transformer.layers:
        if isinstance(layer, SemVIELayer) and layer.visual is not None:
            linears += [part for part in layer.visual.modules() if isinstance(part, nn.Linear | QuantizedLinear)]
            if not hasattr(layer.visual, "o_proj"):
                linears.append(layer.output_of(layer.expert(Modality.IMAGE)))
    if transformer.vocabulary.slots > 1:  # read again for each slot, but then from the processor's own memory
        linears += [
            part for part in transformer.visual_cells.modules() if isinstance(part, nn.Linear | QuantizedLinear)
        ]
    size = 0
    for linear in linears:
        if isinstance(linear, QuantizedLinear):
            size += linear.num_bytes
        elif isinstance(linear, nn.Linear):
            wide = linear.weight.element_size() if transformer.halves is None else HalfWeight.BYTES
            size += linear.weight.numel() * wide
    return size


def _steps(pipe: "MarsPipeline", *, guided: bool, repeats: int) -> dict[str, float]:
    """Steps of one picture, in the middle of it: how long they take, and the least that memory allows."""
    transformer = pipe.model.transformer
    size = bytes_per_step(transformer)
    words = torch.randint(2**62, (min(size, MOST_READ) // 8,))
    drawings = Drawings(pipe)
    sampling = Sampling(guidance=2.0 if guided else 1.0)
    times: list[float] = []
    speeds: list[float] = []
    for seed in range(repeats):
        drawings.submit(draw_order(pipe, PROMPTS[0], seed=seed, sampling=sampling))
        while drawings.busy:
            started = time.perf_counter()
            drawings.step()
            times.append(time.perf_counter() - started)
        speeds += [_bandwidth(words) for _ in range(3)]
    step, speed = median(times), median(speeds)
    return {
        "rows": 2.0 if guided else 1.0,
        "seconds": step,
        "bytes": float(size),
        "bandwidth GB/s": speed / 1e9,
        "least seconds": size / speed,
        "share of the limit": size / speed / step,
    }


def _bandwidth(words: torch.Tensor) -> float:
    """Bytes per second that are read: by the kernel's threads, or by PyTorch's where there is none."""
    kernel = find_kernel()
    started = time.perf_counter()
    if kernel is None:
        words.sum()
    else:
        kernel.read(words.data_ptr(), len(words))
    return 8 * len(words) / (time.perf_counter() - started)


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernel": find_kernel() is not None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mars": mars.__version__,
    }


def _per_megabyte() -> float:
    """Of the peak that the system tells: kilobytes on Linux, bytes on macOS."""
    return 1e6 if sys.platform == "darwin" else 1e3


def _plot(found: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    counts = [batch["pictures"] for batch in found["batches"]]
    for place, (key, title) in enumerate((("seconds", "seconds a call"), ("pictures/s", "pictures a second")), 1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(counts, [batch[key] for batch in found["batches"]], marker="o")
        axes.set(xlabel="pictures at a time", title=title, xticks=counts)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found['model']}, {found['precision']}, {found['pixels'][0]}x{found['pixels'][1]} pixels")
    FigureCanvasAgg(figure)
    with whole_file(file, error=RequestError) as partial:
        figure.savefig(partial, format="png", dpi=120)
