"""Pictures in fewer steps, and guidance that stops early: steps, time and what becomes of the picture.

    python -m benchmarks.fewer_steps [--model DIR] [--candidates 1] [--repeats 3] [--out FILE.json]

Eight prompts are drawn one after the other, in every way in turns, so that what else the machine does meanwhile weighs
on all of them alike; times are medians of whole calls, warm, and ratios those to the plain way with as much guidance.
A window draws other pictures of the same distribution; an early stop draws the same codes up to there. How well
pictures of a way are recognised is `mars eval --set sampling.guidance_stop=0.5` and the like.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from mars.evaluation.speed import PROMPTS
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING, Generated

WINDOWS = (1, 2, 4, 8)
STOPS = (0.75, 0.5, 0.25, 0.0)


def ways(sampling: Sampling, *, windows: Sequence[int] = WINDOWS) -> dict[str, tuple[str, Sampling]]:
    """Every way by name, with the way that it is compared with."""
    plain = replace(sampling, guidance=1.0)
    found = {f"window {window}": ("window 1", replace(sampling, window=window)) for window in windows}
    found |= {f"stop {stop:g}": ("window 1", replace(sampling, guidance_stop=stop)) for stop in STOPS}
    names = {window: f"no guidance, window {window}" for window in windows}
    return found | {names[window]: (names[1], replace(plain, window=window)) for window in windows}


def measure(pipe: MarsPipeline, sampling: Sampling, *, repeats: int) -> dict[str, Any]:
    """Steps and seconds of a picture in every way, and how much of it is what the plain way draws."""
    several = pipe.model.transformer.vocabulary.slots > 1  # codes of a position are drawn together already
    wanted = ways(sampling, windows=WINDOWS[:1] if several else WINDOWS)
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    drawn: dict[str, list[Generated]] = {name: [] for name in wanted}
    for turn in range(repeats + 1):  # the first one warms up
        for prompt in PROMPTS:
            for name, (_, settings) in wanted.items():
                started = time.perf_counter()
                picture = pipe(prompt, seed=turn, sampling=settings)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                    drawn[name].append(picture)
    return {
        "model": pipe.model.info.name,
        "candidates": sampling.candidates,
        "ways": {name: _figures(name, base, seconds, drawn) for name, (base, _) in wanted.items()},
    }


def _figures(
    name: str, base: str, seconds: Mapping[str, list[float]], drawn: Mapping[str, list[Generated]]
) -> dict[str, float]:
    pairs = list(zip(drawn[name], drawn[base], strict=True))
    return {
        "steps": mean(int(picture.images[0].info["steps"]) for picture in drawn[name]),
        "milliseconds": 1000 * median(seconds[name]),
        "times the plain way": median(one / other for one, other in zip(seconds[name], seconds[base], strict=True)),
        "the same codes": mean(float((one.codes == other.codes).double().mean()) for one, other in pairs),
    }


def main() -> None:
    """Prints the figures, and writes them if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder; default: the small model")
    parser.add_argument("--candidates", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sampling = replace(DEFAULT_SAMPLING, candidates=given.candidates)
    figures = measure(MarsPipeline.from_pretrained(given.model), sampling, repeats=given.repeats)
    text = json.dumps(figures, indent=2)
    print(text)  # noqa: T201
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
