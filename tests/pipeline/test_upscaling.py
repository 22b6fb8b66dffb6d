import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mars.checkpoint import read_info
from mars.errors import CheckpointError, ImageError, PromptError, RequestError
from mars.generation.engine import draw
from mars.generation.sampling import Sampling
from mars.model.config import UpscaleConfig
from mars.pipeline import MarsPipeline, upscaling
from mars.pipeline.orders import upscale_order
from mars.pipeline.upscaling import UPSCALE_DEVIATION, UPSCALE_SAMPLING, bicubic_priors

CODES = torch.arange(18).view(3, 2, 3) * 3


@pytest.fixture(scope="module")
def upscaler(tiny_upscaler: Path) -> MarsPipeline:
    return MarsPipeline.from_pretrained(tiny_upscaler)


def test_what_was_drawn_is_drawn_again_with_its_prompts_seeds_and_settings(upscaler: MarsPipeline) -> None:
    small = upscaler(["a red apple", "红苹果"], n=2, seed=5)
    large = upscaler.upscale(small, sampling=Sampling(guidance=2.0))
    assert large.codes.shape == (4, 4, 6)
    assert [image.size for image in large.images] == [(96, 64)] * 4
    assert (large.prompts, large.seeds) == (small.prompts, small.seeds)
    again = upscaler.upscale(small.codes, prompt=small.prompts, seed=small.seeds, sampling=Sampling(guidance=2.0))
    assert torch.equal(again.codes, large.codes)
    for before, after in zip(small.images, large.images, strict=True):
        settings = json.loads(after.info["settings"])
        assert settings.pop("upscale") == {
            "deviation": UPSCALE_DEVIATION, "codes_per_step": 4, "negative_prompt": "", **asdict(Sampling(guidance=2.0))
        }  # fmt: skip
        assert settings == json.loads(before.info["settings"])
        assert after.info["prompt"] == before.info["prompt"]
        assert after.info["model"] == "tiny-upscaler"


def test_a_picture_of_any_size_a_file_and_its_codes_are_upscaled_alike(upscaler: MarsPipeline, tmp_path: Path) -> None:
    small = upscaler("a red apple", seed=5).images[0]
    large = small.resize((480, 320), Image.Resampling.NEAREST)
    large.save(tmp_path / "a.png")
    codes = upscaler.encode(large)[None]

    def drawn(picture: Any, deviation: float | None) -> torch.Tensor:
        return upscaler.upscale(picture, prompt="x", deviation=deviation).codes

    for deviation, same in ((None, codes), (UPSCALE_DEVIATION, large)):
        found = [drawn(one, deviation) for one in (large, tmp_path / "a.png", str(tmp_path / "a.png"))]
        assert all(torch.equal(one, drawn(same, deviation)) for one in found)


def test_codes_lie_as_near_to_those_of_a_bicubic_enlargement_as_the_deviation_says(upscaler: MarsPipeline) -> None:
    codec = upscaler.model.image_tokenizer
    enlarged = [one.resize((96, 64), Image.Resampling.BICUBIC) for one in upscaler.decode(CODES)]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in enlarged])).permute(0, 3, 1, 2).float() / 255
    nearest = codec.encode(pixels)
    free = upscaler.upscale(CODES, prompt="x", deviation=None).codes
    shares = [
        float((upscaler.upscale(CODES, prompt="x", deviation=one).codes == nearest).float().mean())
        for one in (1e-3, 0.3, 1e4)
    ]
    assert shares[0] == 1
    assert shares[0] >= shares[1] >= shares[2]
    assert torch.equal(upscaler.upscale(CODES, prompt="x", deviation=1e4).codes, free)
    assert not torch.equal(free, nearest)
    (prior,) = bicubic_priors(codec, enlarged[:1], grid=(4, 6), deviation=0.3)
    assert torch.equal(prior.argmax(dim=2), nearest[0])


def test_pictures_with_and_without_a_prior_are_drawn_beside_each_other(upscaler: MarsPipeline) -> None:
    orders = [
        upscale_order(upscaler, CODES[number : number + 1], prompt="x", seed=number, deviation=deviation)
        for number, deviation in enumerate((1e-3, None, 0.3))
    ]
    alone = [draw(upscaler.model.transformer, order.requests)[0] for order in orders]
    together = draw(upscaler.model.transformer, [one for order in orders for one in order.requests])
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_codebook_that_is_too_large_has_no_prior_and_the_picture_says_so(
    upscaler: MarsPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscaling, "MOST_CODES", 1)
    drawn = upscaler.upscale(CODES, prompt="x", deviation=1e-3)
    assert json.loads(drawn.images[0].info["settings"])["upscale"]["deviation"] is None
    assert torch.equal(drawn.codes, upscaler.upscale(CODES, prompt="x", deviation=None).codes)


def test_a_prior_of_another_shape_is_refused(upscaler: MarsPipeline) -> None:
    (request,) = upscale_order(upscaler, CODES[:1]).requests
    with pytest.raises(RequestError, match=r"the prior must have the shape \(4, 6, \d+\), got \(4, 6, 2\)"):
        draw(upscaler.model.transformer, [replace(request, prior=torch.zeros(4, 6, 2))])


def test_prompt_and_picture_matter_and_the_likeliest_codes_need_no_seed(upscaler: MarsPipeline) -> None:
    base = upscaler.upscale(CODES, prompt="a red apple", deviation=None)
    assert UPSCALE_SAMPLING.temperature == 0
    assert torch.equal(upscaler.upscale(CODES, prompt="a red apple", seed=99, deviation=None).codes, base.codes)
    assert not torch.equal(upscaler.upscale(CODES, deviation=None).codes, base.codes)
    assert not torch.equal(base.codes[0], base.codes[1])
    drawn = [upscaler.upscale(CODES, seed=[1, 2, seed], sampling=Sampling()).codes for seed in (3, 4, 3)]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:2], drawn[1][:2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("picture", "options", "kind", "message"),
    [
        (CODES[0], {}, RequestError, r"must have the shape \(pictures, 2, 3\), got \(2, 3\)"),
        (CODES[:, :1], {}, RequestError, r"got \(3, 1, 3\)"),
        (CODES[:0], {}, RequestError, r"got \(0, 2, 3\)"),
        (CODES, {"prompt": ["a", "b"]}, RequestError, r"one per picture \(3\), got 2"),
        (CODES, {"seed": [1]}, RequestError, r"one per picture \(3\), got 1"),
        (CODES, {"deviation": 0.0}, RequestError, "deviation must be positive, or none for the model alone, got 0.0"),
        (CODES, {"seed": -1}, RequestError, "seed must lie in"),
        (CODES, {"prompt": "x" * 600}, PromptError, "at most 512 tokens, got 601"),
        (CODES, {"prompt": "x" * 180}, RequestError, "must fit into 192 positions"),
        ("nowhere.png", {}, ImageError, "no picture at nowhere.png"),
    ],
)
def test_what_cannot_be_upscaled_is_one_line(
    upscaler: MarsPipeline, picture: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        upscaler.upscale(picture, **options)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_not_trained_to_upscale_says_so(pipe: MarsPipeline) -> None:
    with pytest.raises(RequestError, match="tiny was not trained to upscale; open a model of"):
        pipe.upscale(CODES)
    assert pipe.describe()["super-resolution"] == "none"


def test_a_saved_upscaler_upscales_the_same_and_says_so(upscaler: MarsPipeline, tmp_path: Path) -> None:
    upscaler.save_pretrained(tmp_path / "saved")
    assert read_info(tmp_path / "saved")[0].upscale == UpscaleConfig(scale=2, codes_per_step=4)
    assert "48x32 to 96x64; 4 codes a step" in (tmp_path / "saved" / "README.md").read_text("utf-8")
    again = MarsPipeline.from_pretrained(tmp_path / "saved")
    assert again.describe()["super-resolution"] == "48x32 to 96x64; 4 codes a step"
    assert np.array_equal(again.upscale(CODES).codes, upscaler.upscale(CODES).codes)


def test_a_folder_whose_upscaling_makes_no_sense_is_one_line(tiny_upscaler: Path, tmp_path: Path) -> None:
    table = json.loads((tiny_upscaler / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(table | {"upscale": table["upscale"] | {"codes_per_step": 8}}))
    with pytest.raises(CheckpointError, match="codes_per_step must be a square such as 1, 4 or 16, got 8"):
        read_info(tmp_path)
