from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import diffusion_baseline
from benchmarks.diffusion_baseline import Baseline, Recipe
from benchmarks.diffusion_data import caption_ids, make_latents, padded, read_states, trained_pictures
from benchmarks.diffusion_model import (
    DiffusionPainter,
    build_unet,
    count_parameters,
    noising,
    open_painter,
    predict,
    sample,
    step_flops,
    unet_config,
    width_for,
)
from mars.checkpoint import MarsModel, load_image_tokenizer, read_json, read_tensors
from mars.config import from_dict
from mars.data.crops import Sizes
from mars.errors import CheckpointError, ConfigError, DataError
from mars.pipeline import MarsPipeline
from mars.training.stages import DataConfig, StageConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
TEXT = (torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


class Exact(nn.Module):
    """The best prediction of v where latents are normally distributed."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, deviation**2

    def forward(self, noisy: Tensor, times: Tensor, **_: Any) -> tuple[Tensor]:
        share = noising().alphas_cumprod[times][:, None, None, None].clamp(max=1)
        signal, noise = share.sqrt(), (1 - share).sqrt()
        gain = signal * self.variance / (share * self.variance + 1 - share)
        clean = self.mean + gain * (noisy - signal * self.mean)
        return (signal * (noisy - signal * clean) / noise - noise * clean,)


@pytest.mark.parametrize(("mean", "deviation"), [(3.0, 0.01), (0.0, 1.0), (-1.0, 0.5)])
def test_an_exact_prediction_gives_the_distribution_it_is_of(mean: float, deviation: float) -> None:
    noise = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    found = sample(Exact(mean, deviation), noise, TEXT, None)
    assert float(found.mean()) == pytest.approx(mean, abs=0.03)
    assert float(found.std()) == pytest.approx(deviation, abs=0.05)


def test_guidance_moves_away_from_the_empty_caption() -> None:
    class Two(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            found: tuple[Tensor] = Exact(float(encoder_hidden_states.mean()), 0.1)(noisy, times)
            return found

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    one, other = (TEXT[0] + 1, TEXT[1]), TEXT
    plain = sample(Two(), noise, one, None)
    same = sample(Two(), noise, one, other, guidance=1.0)
    assert torch.allclose(plain, same, atol=1e-4)
    assert float(sample(Two(), noise, one, other, guidance=2.0).mean()) > 1.5


def test_states_do_not_depend_on_what_is_read_beside_them(pipe: MarsPipeline) -> None:
    rows = caption_ids(["red", "a large blue star", ""], pipe.model.text_tokenizer)
    assert [row[0] for row in rows] == [pipe.model.text_tokenizer.bos_id] * 3
    together = read_states(pipe.model.transformer, rows)
    alone = [read_states(pipe.model.transformer, [row])[0] for row in rows]
    for one, other, row in zip(together, alone, rows, strict=True):
        assert one.shape == other.shape == (len(row), pipe.model.transformer.config.language.width)
        assert torch.allclose(one, other, rtol=0.05, atol=0.05)  # bf16, where the machine has units for it
    states, real = padded(together)
    assert states.shape[1] % 8 == 0
    assert real.sum(dim=1).tolist() == [len(row) for row in rows]
    assert torch.equal(states[real], torch.cat(together))


def test_flops_are_those_of_a_real_step() -> None:
    config = unet_config(latent=(4, 8, 8), text_width=16, width=16)
    unet = build_unet(config)
    states, real = torch.randn(3, 8, 16), torch.ones(3, 8, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        predict(unet, torch.randn(3, 4, 8, 8), torch.tensor([1, 5, 9]), (states, real)).square().mean().backward()
    assert step_flops(config, batch=3, positions=8) == counter.get_total_flops() > 1e8


@pytest.fixture(scope="module")
def baseline(
    tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, tiny_model: Path, tiny_codes: Path, tiny_pictures: Path,
    pocket: dict[str, Any],
) -> Callable[..., Baseline]:  # fmt: skip
    """A run on the tiny pictures, in the folder of that name."""
    folder = tmp_path_factory.mktemp("baseline")

    def build(out: str, *, recipe: Recipe | None = None, **changes: Any) -> Baseline:
        table = {
            "name": "tiny", "out": "none", "steps": 4, "batch_size": 6, "guidance_dropout": 0.2,
            "model": {"language": str(tiny_llm), "image_tokenizer": str(tiny_model), "semvie": dict(pocket)},
            "data": {"shards": [str(tiny_codes)]},
        }  # fmt: skip
        config = from_dict(StageConfig, table | changes)
        recipe = recipe or Recipe(warmup=0, learning_rate=1e-3)
        return Baseline(config, recipe, pictures=[tiny_pictures], out=folder / out)

    return build


@pytest.fixture(scope="module")
def trained(baseline: Callable[..., Baseline]) -> Baseline:
    """A run of one step."""
    run = baseline("trained")
    run.train(1, snapshots=[])
    return run


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    baseline: Callable[..., Baseline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion_baseline, "LOOKAHEAD", 3)
    whole, first = baseline("whole"), baseline("parts")
    before = {name: weight.detach().clone() for name, weight in whole.weights.items()}
    assert whole.train(4, snapshots=[2])
    assert not first.train(4, snapshots=[2], stopping=lambda: first.step == 3)
    second = baseline("parts")
    assert second.step == 3
    assert second.train(4, snapshots=[2])
    for name, weight in whole.weights.items():
        assert torch.equal(weight, second.weights[name]), name
        assert torch.equal(whole.average.values[name], second.average.values[name]), name
    assert any(not torch.equal(weight, before[name]) for name, weight in whole.weights.items())
    for run in (whole, second):
        points = [read_json(run.out / "snapshots" / f"step-{step:06d}" / "snapshot.json") for step in (2, 4)]
        assert [point["samples"] for point in points] == [12, 24]
        assert 0 < points[0]["flops"] < points[1]["flops"] == whole.flops
        assert 0 < points[0]["text_flops"] <= points[1]["text_flops"]
        assert 0 < points[0]["seconds"] < points[1]["seconds"]
    with pytest.raises(ConfigError, match="recipe must stay"):
        baseline("parts", recipe=Recipe(learning_rate=1e-4))


def test_pictures_and_captions_are_those_of_our_loader(
    baseline: Callable[..., Baseline], tiny_codes: Path, tiny_model: Path
) -> None:
    run = baseline("run", guidance_dropout=0.5)
    data = run.stage.data
    wanted = trained_pictures([tiny_codes], kinds=data.kinds, languages=data.languages)
    image_tokenizer, _ = load_image_tokenizer(tiny_model)
    emptied = 0
    for step in range(4):
        pictures, texts = run._captions(step)
        for picture, text, drawn in zip(pictures, texts, run.loader.batch(6 * step, 6), strict=True):
            assert text in ("", drawn.caption.text)
            assert drawn.caption in wanted[picture].record.captions
            emptied += text == ""
            vectors_NZ = run.latents_NZRC[picture].float().permute(1, 2, 0).flatten(0, 1)
            agree = image_tokenizer.quantizer.encode(vectors_NZ) == drawn.codes.flatten()
            assert agree.double().mean() > 0.8  # fp16 moves a few
    assert 4 < emptied < 20


def test_the_size_is_that_of_our_visual_side_and_latents_are_normal(trained: Baseline) -> None:
    run = trained
    latents = run.scales.latents(run.latents_NZRC.float())
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3)
    assert torch.allclose(run.scales.vectors(latents), run.latents_NZRC.float(), atol=1e-3)
    widths = [run.about["unet"] | {"block_out_channels": [width, 2 * width, 2 * width]} for width in (16, 32)]
    sizes = [count_parameters(config) for config in widths]
    assert run.about["parameters"] == sizes[0] < sizes[1]
    assert width_for(sizes[1], latent=(8, 2, 3), text_width=32) == 32


def test_a_snapshot_draws_the_same_picture_for_a_seed_whatever_is_drawn_beside_it(
    trained: Baseline, pipe: MarsPipeline
) -> None:
    painter = open_painter(trained.out, step=1, model=pipe.model, seed=7, steps=3)
    many = painter.draw(["red", "blue", "green"])
    (alone,) = painter.draw(["blue"], first=1)
    assert [one.seed for one in many] == [7, 8, 9]
    assert many[1].image.size == alone.image.size == (48, 32)
    assert distance(many[1].image, alone.image) < 3 < distance(many[1].image, many[2].image)
    assert len(painter.draw_without_prompt(2)) == 2
    kept = read_tensors(trained.out / "snapshots" / "step-000001" / "unet.safetensors")
    assert all(torch.equal(kept[name], value.half()) for name, value in trained.average.values.items())


def distance(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_rebuilding_shows_latents_as_they_are(trained: Baseline, pipe: MarsPipeline) -> None:
    painter: DiffusionPainter = open_painter(trained.out, step=1, model=pipe.model, seed=0)
    pictures = pipe(["a", "b"], seed=[0, 1]).images
    vectors = painter.rebuild(pictures)
    true = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255 for one in pictures])
    with torch.inference_mode():
        wanted = pipe.model.image_tokenizer.to_images(pipe.model.image_tokenizer.to_vectors(true)).clamp(0, 1)
    for one, image in zip(vectors, wanted, strict=True):
        assert np.abs(np.asarray(one) / 255 - image.permute(1, 2, 0).numpy()).max() < 0.01


def test_another_image_tokenizer_or_llm_is_refused(trained: Baseline, pipe: MarsPipeline) -> None:
    other: MarsModel = replace(pipe.model, info=replace(pipe.model.info, language_digest="sha256:0"))
    with pytest.raises(CheckpointError, match="trained with the language"):
        open_painter(trained.out, step=1, model=other, seed=0)


def test_a_shard_that_is_listed_twice_has_its_latents_twice(
    tiny_codes: Path, tiny_pictures: Path, tiny_model: Path
) -> None:
    data = DataConfig(shards=(tiny_codes, tiny_codes))
    wanted = trained_pictures(data.shards, kinds=data.kinds, languages=data.languages)
    image_tokenizer, _ = load_image_tokenizer(tiny_model)
    latents = make_latents(wanted, [tiny_pictures], image_tokenizer=image_tokenizer, sizes=Sizes(factor=16))
    first, second = latents.chunk(2)
    assert torch.equal(first, second)
    assert bool((first != 0).flatten(1).any(dim=1).all())


def test_pictures_that_the_codes_were_not_made_from_are_refused(
    tiny_codes: Path, tiny_pictures: Path, tiny_model: Path
) -> None:
    data = DataConfig(shards=(tiny_codes,))
    wanted = trained_pictures([tiny_codes], kinds=data.kinds, languages=data.languages)
    image_tokenizer, _ = load_image_tokenizer(tiny_model)
    missing = [replace(wanted[0], record=replace(wanted[0].record, key="nobody")), *wanted[1:]]
    with pytest.raises(DataError, match="1 pictures of the code shards are in none"):
        make_latents(missing, [tiny_pictures], image_tokenizer=image_tokenizer, sizes=Sizes(factor=16))
    turned = [replace(one, codes=wanted[place - 1].codes) for place, one in enumerate(wanted)]
    with pytest.raises(DataError, match="of the codes agree"):
        make_latents(turned, [tiny_pictures], image_tokenizer=image_tokenizer, sizes=Sizes(factor=16))
