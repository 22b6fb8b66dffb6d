"""Quality against training compute: our model and a diffusion model, on the same data, benches, prompts and seeds.

    python -m benchmarks.efficiency --ours CONFIG... --diffusion RUN --pictures data/noto.tar [--out out/efficiency]

CONFIG are the stages of our run (more than one where a stage continued the one before), whose checkpoints were kept;
RUN is one of `python -m benchmarks.diffusion_baseline` on the first of them. Each snapshot draws the same prompts and
is scored by the emoji bench (trained names and held-out paraphrases, both languages together), by the compositional
bench (all categories and both languages together), and by FID and KID to training pictures. Points that were measured
are kept in OUT/points, so the command goes on where it was stopped.

    OUT/efficiency.json, .md, .png

The paper claims 9 % of the compute; what comes out here is the ratio in miniature, whatever it is.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.diffusion_model import GUIDANCE, STEPS, open_painter
from benchmarks.efficiency_report import compare, draw_plot, markdown
from benchmarks.efficiency_runs import DIFFUSION, OURS, Snapshot, diffusion_snapshots, our_snapshots, spread
from mars.checkpoint import read_json, write_json
from mars.config import load_config
from mars.data.shards import read_pictures
from mars.errors import DataError
from mars.evaluation.composition import Task, Truth, choose_tasks, score
from mars.evaluation.config import EmojiBench
from mars.evaluation.distribution import BUNDLED, described, distances, features_of, open_network
from mars.evaluation.drawing import Artist, Drawing, Painter
from mars.evaluation.features import EfficientNetLite0
from mars.evaluation.metrics import hits, interval, resample
from mars.evaluation.questions import LANGUAGES, Question
from mars.evaluation.retrieval import DISTRIBUTION, Features, Gallery, Retrieval, ask
from mars.files import file_digest
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.training.stages import StageConfig

NAMES, PARAPHRASES = "trained names", "paraphrases"

Say = Callable[[str], None]


@dataclass
class _Timed:
    """A painter whose drawing is timed."""

    painter: Painter
    seconds: float = 0.0
    pictures: int = 0

    @property
    def seed(self) -> int:
        return self.painter.seed

    def draw(self, prompts: Sequence[str], *, first: int = 0) -> list[Drawing]:
        started = time.perf_counter()
        drawn = self.painter.draw(prompts, first=first)
        self.seconds += time.perf_counter() - started
        self.pictures += len(drawn)
        return drawn

    def draw_without_prompt(self, count: int) -> list[Image.Image]:
        return self.painter.draw_without_prompt(count)

    def rebuild(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        return self.painter.rebuild(pictures)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What all snapshots of a family are compared with: its floor and its ceiling."""

    features: Features
    truths: dict[str, Truth]
    """By category."""


@dataclass(kw_only=True)
class Judge:
    """The benches with their prompts, the same for every snapshot.

    Args:
        pictures: the emoji shard.
        prompts: trained names in each language; of paraphrases half as many.
        scenes: prompts of each category in each language.
        size: pixels on each side of what is drawn.
    """

    pictures: Path
    prompts: int
    scenes: int
    size: int
    seed: int
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shard = {one.record.key: one for one in read_pictures(self.pictures)}
        bench = EmojiBench(pictures=self.pictures, prompts=self.prompts, sets=(NAMES, PARAPHRASES))
        asked = ask(self.shard, bench, seed=self.seed)
        self.questions: dict[str, list[Question]] = asked.questions
        self.tasks: dict[Any, list[Task]] = dict(choose_tasks(count=self.scenes, seed=self.seed, size=self.size))
        self.notes += asked.notes
        self.retriever, self.network = EfficientNetLite0(), open_network(BUNDLED)
        keys = sorted(key for key, one in self.shard.items() if one.record.split == "train")
        chosen = keys[:: -(-len(keys) // DISTRIBUTION)]
        self.true_ND = features_of(self.network, [Image.fromarray(self.shard[key].pixels()) for key in chosen])

    def settings(self) -> dict[str, Any]:
        """What scores depend on beside the model."""
        counts = {name: len(group) for name, group in (self.questions | self.tasks).items()}
        return {"pictures": self.pictures.name, "prompts": counts, "size": self.size, "seed": self.seed}

    def reference(self, painter: Painter) -> Reference:
        """Floor and ceiling of a family, by one of its painters."""
        gallery = Gallery(artist=painter, network=self.retriever, shard=self.shard)
        return Reference(
            features=gallery.shared_features(one for group in self.questions.values() for one in group),
            truths={name: Truth.of(tasks, rebuild=painter.rebuild) for name, tasks in self.tasks.items()},
        )

    def scores(self, painter: Painter, reference: Reference) -> dict[str, Any]:
        """The figures of `efficiency_report.METRICS`, rates with 95 % intervals over prompts."""
        gallery, found = Gallery(artist=painter, network=self.retriever, shard=self.shard), Retrieval()
        for name, group in self.questions.items():
            gallery.measure(name, group, features=reference.features, found=found)
        scores: dict[str, Any] = {}
        for figure, name, top in (("top1", NAMES, 1), ("top5", NAMES, 5), ("paraphrases", PARAPHRASES, 1)):
            ranks = [line["rank"] - 1 for line in found.predictions if line["set"] == name]
            if ranks:
                scores[figure] = self._rate(hits(np.array(ranks), top=top))
        rights: list[bool] = []
        by_category: dict[str, float] = {}
        for name, tasks in self.tasks.items():
            for language in LANGUAGES:
                images = [one.image for one in painter.draw([task.prompt(language) for task in tasks])]
                right = score(tasks, images, truth=reference.truths[name], seed=self.seed)["rights"]
                by_category[f"{name} {language}"] = float(np.mean(right))
                rights += right
        scores["composition"] = {**self._rate(np.array(rights, dtype=np.float64)), "categories": by_category}
        drawn_ND = features_of(self.network, [one.image for one in found.drawings[NAMES]])
        far = distances(self.true_ND, drawn_ND, seed=self.seed)
        scores["fid"] = {"value": far["fid"], "pictures": far["pictures"], "network": described(BUNDLED)}
        scores["kid"] = {"value": far["kid"], "deviation": far["kid_deviation"]}
        return scores

    def _rate(self, right_N: Any) -> dict[str, Any]:
        means = resample([right_N], seed=self.seed)[0]
        return {"value": float(right_N.mean()), "interval": interval(means), "pictures": len(right_N)}


Open = Callable[[Snapshot], Painter]


def measure(
    snapshots: Sequence[Snapshot], open_snapshot: Open, *, judge: Judge, settings: dict[str, Any], out: Path, say: Say
) -> list[dict[str, Any]]:
    """Costs and scores of snapshots, in their order; those in `out` were measured before.

    Raises:
        DataError: if `out` holds points of other weights or settings.
    """
    points, reference = [], None
    for snapshot in snapshots:
        path = out / f"{snapshot.name}.json"
        wanted = json.loads(json.dumps(settings | {"weights": file_digest(snapshot.weights)}))
        if path.is_file():
            known = read_json(path)
            if known["settings"] != wanted:
                raise DataError(f"{path} is of other weights or settings; name another folder with --out")
        else:
            reference = reference or judge.reference(open_snapshot(snapshots[-1]))
            painter, started = _Timed(open_snapshot(snapshot)), time.perf_counter()
            scores = judge.scores(painter, reference)
            drawing = {"drawing_seconds": painter.seconds / max(1, painter.pictures)}
            known = {"settings": wanted, "scores": scores, **drawing}
            write_json(path, known)
            say(f"{snapshot.name}: {time.perf_counter() - started:.0f} s, " + _line(scores))
        points.append({**snapshot.costs(), **{name: known[name] for name in ("scores", "drawing_seconds")}})
    return points


def _line(scores: dict[str, Any]) -> str:
    return ", ".join(f"{name} {one['value']:.3f}" for name, one in scores.items())


def _read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", type=Path, required=True, help="stages of our run")
    parser.add_argument("--diffusion", type=Path, required=True, help="a run of the baseline")
    parser.add_argument("--pictures", type=Path, default=Path("data/noto.tar"))
    parser.add_argument("--prompts", type=int, default=100, help="trained names in each language")
    parser.add_argument("--scenes", type=int, default=24, help="of each category in each language")
    parser.add_argument("--points", type=int, default=8, help="snapshots of each model, at most")
    parser.add_argument("--temperature", type=float, default=DEFAULT_SAMPLING.temperature)
    parser.add_argument("--our-guidance", type=float, default=DEFAULT_SAMPLING.guidance)
    parser.add_argument("--candidates", type=int, default=1, help="of ours, the likeliest of which is kept")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the diffusion model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the diffusion model's sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/efficiency"))
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what was not measured yet, and writes the report."""
    given = _read_arguments(arguments)
    ours = spread(our_snapshots([load_config(StageConfig, path) for path in given.ours]), most=given.points)
    theirs = spread(diffusion_snapshots(given.diffusion), most=given.points)
    last = MarsPipeline.from_pretrained(ours[-1].weights.parent)
    judge = Judge(
        pictures=given.pictures, prompts=given.prompts, scenes=given.scenes, size=last.sizes[0][0], seed=given.seed
    )
    sampling = Sampling(temperature=given.temperature, guidance=given.our_guidance, candidates=given.candidates)
    how = {
        OURS: {"sampling": asdict(sampling)},
        DIFFUSION: {"guidance": given.guidance, "steps": given.steps, "decoder": last.model.visual_digest},
    }
    openers: dict[str, Open] = {
        OURS: lambda one: Artist(
            pipe=MarsPipeline.from_pretrained(one.weights.parent), sampling=sampling, seed=given.seed
        ),
        DIFFUSION: lambda one: open_painter(
            given.diffusion,
            step=one.step,
            model=last.model,
            seed=given.seed,
            guidance=given.guidance,
            steps=given.steps,
        ),
    }
    points = {
        family: measure(
            snapshots,
            openers[family],
            judge=judge,
            settings=judge.settings() | how[family],
            out=given.out / "points",
            say=_say,
        )
        for family, snapshots in ((OURS, ours), (DIFFUSION, theirs))
    }
    about = read_json(given.diffusion / "baseline.json")
    report = {
        "points": points,
        "comparison": compare(points),
        "settings": judge.settings() | how,
        "parameters": {OURS: about["our_parameters"], DIFFUSION: about["parameters"]},
        "threads": torch.get_num_threads(),
        "notes": [*judge.notes, _note(about, how)],
    }
    write_json(given.out / "efficiency.json", report)
    (given.out / "efficiency.md").write_text(markdown(report), "utf-8")
    draw_plot(report, given.out / "efficiency.png")
    _say(markdown(report))


def _note(about: dict[str, Any], how: dict[str, Any]) -> str:
    return (
        f"Trained parameters: ours {about['our_parameters'] / 1e6:.1f} M, diffusion {about['parameters'] / 1e6:.1f} M. "
        "FLOPs are those of products, forward and backward. Not counted for either: training the image tokenizer, its "
        f"codes or latents ({about['latents_flops']:.2e}), and reading each caption once with the frozen LLM (a column "
        f"of its own). Sampling: {json.dumps(how[OURS]['sampling'])}; {how[DIFFUSION]['steps']} steps of DPM-Solver++ "
        f"with guidance {how[DIFFUSION]['guidance']}. FID of so few pictures is too large: compare it between rows."
    )


if __name__ == "__main__":
    main()
