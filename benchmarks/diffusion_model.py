"""The diffusion baseline: a U-Net of `diffusers` on latents, after the states of a frozen LLM, and the painter of it.

    caption -> the frozen LLM's last hidden states -> cross attention --.
    noise (Z, R, C) ---------------------------------------------------> U-Net, 25 steps of DPM-Solver++ -> decoder

The recipe is the usual one (Rombach et al. 2022) with the schedule of Lin et al. 2023 (no signal at the last step,
prediction of v, steps counted from the end), without which a model cannot paint a page white. Latents are the vectors
of our image tokenizer before quantization, each channel normalised; pixels come from the same decoder.

Letters: B batch, Z code width, R rows, C columns, T positions, D the LLM's width.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.diffusion_data import autocast, caption_ids, padded, read_states
from mars.checkpoint import MarsModel, codes_digest, load_into, read_json, read_tensors
from mars.errors import CheckpointError
from mars.evaluation.drawing import Drawing, batches

NOISE_LEVELS = 1000
NOISE: dict[str, Any] = {
    "num_train_timesteps": NOISE_LEVELS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""Stable Diffusion's betas, rescaled to end in pure noise (Lin et al. 2023: Common Diffusion Noise Schedules ...)."""
STEPS, GUIDANCE = 25, 3.0
"""Of sampling."""
GROUPS = 16
"""Channels of a norm's groups; widths are multiples of it."""
MOST_WIDTH = 320


def unet_config(*, latent: tuple[int, int, int], text_width: int, width: int) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`: three levels, attention to the caption in the upper two and in the middle.

    Args:
        latent: Z, R and C.
        text_width: D.
        width: channels of the first level; the others have twice as many.
    """
    channels, rows, columns = latent
    return {
        "sample_size": [rows, columns],
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [width, 2 * width, 2 * width],
        "layers_per_block": 1,
        "norm_num_groups": GROUPS,
        "cross_attention_dim": text_width,
        "attention_head_dim": 8,
    }


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A U-Net with new weights.

    Its attention is the plain one, which for heads this narrow is faster on a CPU, backward, than PyTorch's own.
    """
    unet = UNet2DConditionModel(**config)
    unet.set_attn_processor(AttnProcessor())
    return unet


def count_parameters(config: dict[str, Any]) -> int:
    """Without making any weights."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in UNet2DConditionModel(**config).parameters())


def width_for(parameters: int, *, latent: tuple[int, int, int], text_width: int) -> int:
    """The width whose U-Net has most nearly so many parameters."""

    @cache
    def size(width: int) -> int:
        return count_parameters(unet_config(latent=latent, text_width=text_width, width=width))

    widths = range(GROUPS, MOST_WIDTH + 1, GROUPS)
    place = bisect_left(widths, parameters, key=size)
    near = widths[max(0, place - 1) : place + 1]
    return min(near, key=lambda width: abs(size(width) - parameters))


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What latents and states are normalised by."""

    latent_mean_Z: Tensor
    latent_deviation_Z: Tensor
    text_mean_D: Tensor
    text_deviation_D: Tensor

    def latents(self, vectors_BZRC: Tensor) -> Tensor:
        """Vectors before quantization to latents of mean 0 and deviation 1."""
        return (vectors_BZRC - self.latent_mean_Z[:, None, None]) / self.latent_deviation_Z[:, None, None]

    def vectors(self, latents_BZRC: Tensor) -> Tensor:
        """The other way."""
        return latents_BZRC * self.latent_deviation_Z[:, None, None] + self.latent_mean_Z[:, None, None]

    def text(self, states_BTD: Tensor) -> Tensor:
        """States of mean 0 and deviation 1."""
        return (states_BTD - self.text_mean_D) / self.text_deviation_D


def predict(unet: UNet2DConditionModel, noisy_BZRC: Tensor, times: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The U-Net's v (B, Z, R, C), for normalised states (B, T, D) and which of their positions are real (B, T)."""
    with autocast():
        found = unet(
            noisy_BZRC, times, encoder_hidden_states=text[0], encoder_attention_mask=text[1], return_dict=False
        )
    v_BZRC: Tensor = found[0]
    return v_BZRC.float()


def step_flops(config: dict[str, Any], *, batch: int, positions: int) -> int:
    """FLOPs of the products of a step, forward and backward, counted without computing anything.

    Args:
        config: of the U-Net.
        positions: of the captions, padding included.
    """
    return _step_flops(json.dumps(config), batch=batch, positions=positions)


@cache
def _step_flops(config: str, *, batch: int, positions: int) -> int:
    shapes = json.loads(config)
    with torch.device("meta"):
        copy = build_unet(shapes)
        latents_BZRC = torch.empty(batch, shapes["in_channels"], *shapes["sample_size"])
        text = torch.empty(batch, positions, shapes["cross_attention_dim"]), torch.ones(batch, positions).bool()
        times = torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        predict(copy, latents_BZRC, times, text).mean().backward()
    return int(counter.get_total_flops())


def noising() -> DDPMScheduler:
    """Of training: `add_noise`, and `get_velocity`, which is what is predicted (Salimans and Ho 2022)."""
    return DDPMScheduler(**NOISE)


@torch.inference_mode()
def sample(
    unet: UNet2DConditionModel,
    noise_BZRC: Tensor,
    text: tuple[Tensor, Tensor],
    free: tuple[Tensor, Tensor] | None,
    *,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
) -> Tensor:
    """Noise to latents (B, Z, R, C); what comes is a function of the noise and the text.

    Args:
        free: states of the empty caption, that guidance moves away from; null is no guidance.
    """
    solver = DPMSolverMultistepScheduler(**NOISE)
    solver.set_timesteps(steps)
    x_BZRC = noise_BZRC
    for time in solver.timesteps:
        times = time.expand(len(x_BZRC))
        v_BZRC = predict(unet, x_BZRC, times, text)
        if free is not None:
            free_BZRC = predict(unet, x_BZRC, times, free)
            v_BZRC = free_BZRC + guidance * (v_BZRC - free_BZRC)
        x_BZRC = solver.step(v_BZRC, time, x_BZRC, return_dict=False)[0]
    return x_BZRC


@dataclass(frozen=True, kw_only=True)
class DiffusionPainter:
    """A snapshot of the baseline, with the text side and the decoder of one of our models (`drawing.Painter`)."""

    unet: UNet2DConditionModel
    scales: Scales
    model: MarsModel
    seed: int
    guidance: float = GUIDANCE
    steps: int = STEPS

    def draw(self, prompts: Sequence[str], *, first: int = 0) -> list[Drawing]:
        """One picture for each prompt, the first from the noise of seed `seed + first`."""
        drawn: list[Drawing] = []
        (free_TD,) = self._states([""])
        for some in batches(prompts):
            seeds = [self.seed + first + len(drawn) + place for place in range(len(some))]
            text, free = self._text(self._states(some)), self._text([free_TD] * len(some))
            latents = sample(self.unet, self._noise(seeds), text, free, guidance=self.guidance, steps=self.steps)
            drawn += [
                Drawing(prompt=prompt, seed=seed, image=image)
                for prompt, seed, image in zip(some, seeds, self._decode(latents), strict=True)
            ]
        return drawn

    def draw_without_prompt(self, count: int) -> list[Image.Image]:
        """Pictures for the empty caption."""
        pictures: list[Image.Image] = []
        (free_TD,) = self._states([""])
        for seeds in batches(range(self.seed, self.seed + count)):
            text = self._text([free_TD] * len(seeds))
            pictures += self._decode(sample(self.unet, self._noise(seeds), text, None, steps=self.steps))
        return pictures

    @torch.inference_mode()
    def rebuild(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures put through the image tokenizer without quantization: what the right latents would show."""
        rebuilt: list[Image.Image] = []
        for some in batches(pictures):
            pixels = torch.stack([torch.from_numpy(np.array(one.convert("RGB"))) for one in some])
            vectors_BZRC = self.model.image_tokenizer.to_vectors(pixels.permute(0, 3, 1, 2).float() / 255)
            rebuilt += self._decode(self.scales.latents(vectors_BZRC))
        return rebuilt

    def _states(self, texts: Sequence[str]) -> list[Tensor]:
        return read_states(self.model.transformer, caption_ids(texts, self.model.text_tokenizer))

    def _text(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        states_BTD, real_BT = padded(states)
        return self.scales.text(states_BTD), real_BT

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        rows, columns = self.model.info.grids[0]
        shape = self.model.image_tokenizer.config.code_width, rows, columns
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @torch.inference_mode()
    def _decode(self, latents_BZRC: Tensor) -> list[Image.Image]:
        images = self.model.image_tokenizer.to_images(self.scales.vectors(latents_BZRC)).clamp(0, 1)
        return [Image.fromarray(one) for one in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def read_scales(run: Path) -> Scales:
    """Of a run's folder."""
    return Scales(**read_tensors(run / "scales.safetensors"))


def open_painter(
    run: Path, *, step: int, model: MarsModel, seed: int, guidance: float = GUIDANCE, steps: int = STEPS
) -> DiffusionPainter:
    """A snapshot of a run of `diffusion_baseline`.

    Args:
        model: one of ours on the same LLM and the same image tokenizer, whose decoder is used.

    Raises:
        CheckpointError: if the snapshot is missing or damaged, or `model` is on others.
    """
    about = read_json(run / "baseline.json")
    ours = {"language": model.info.language_digest, "image_tokenizer": codes_digest(model.image_tokenizer)}
    for name, digest in ours.items():
        if about[name] != digest:
            raise CheckpointError(f"{run} was trained with the {name} {about[name][:19]}, but ours has {digest[:19]}")
    unet = build_unet(about["unet"])
    path = run / "snapshots" / f"step-{step:06d}" / "unet.safetensors"
    load_into(unet, read_tensors(path), where=str(path))
    return DiffusionPainter(
        unet=unet.eval().requires_grad_(False),
        scales=read_scales(run),
        model=model,
        seed=seed,
        guidance=guidance,
        steps=steps,
    )
