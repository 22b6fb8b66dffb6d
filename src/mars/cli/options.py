"""What commands share: options of the same meaning, and how a model is opened."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mars.generation.sampling import Sampling
    from mars.pipeline import MarsPipeline

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A folder, or owner/name[@revision] on the hub; default: the one we ship."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for an error.", is_eager=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

Precision = Annotated[str, typer.Option(help="Of the weights in memory: fp32, fp16, int8 or int4.")]

Lora = Annotated[Path | None, typer.Option(help="A folder with a LoRA adapter, from `mars train` or peft.")]
LoraScale = Annotated[float, typer.Option(help="How strongly the adapter counts; 1 as it was trained.")]

Guidance = Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1 is no guidance.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest code.")]
TopK = Annotated[int | None, typer.Option(help="Choose among this many codes; 0 is all.")]
TopP = Annotated[float | None, typer.Option(help="Choose among codes of this share of probability.")]
GuidanceStop = Annotated[
    float | None,
    typer.Option(help="Guide this share (0 to 1) of the codes, from the first; the others cost less."),
]
Window = Annotated[
    int | None, typer.Option(help="Codes read in a step: more than 1 is speculative Jacobi decoding, in fewer steps.")
]
Scorer = Annotated[
    str, typer.Option(help="Who chooses among candidates: likelihood, caption, or package.module:function.")
]
Candidates = Annotated[int | None, typer.Option(help="Draw this many and keep the one that the model finds likeliest.")]


def say(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr)  # noqa: T201


def open_pipeline(
    model: str | None, *, precision: str = "fp16", lora: Path | None = None, lora_scale: float = 1.0
) -> "MarsPipeline":
    """The pipeline of a model's folder or hub id (`owner/name`, or `owner/name@revision`), with an adapter if named."""
    from mars.pipeline import MarsPipeline

    source, _, revision = (model or "").partition("@")
    if model is not None and Path(model).exists():
        source, revision = model, ""
    return MarsPipeline.from_pretrained(
        source or None,
        revision=revision or None,
        precision=precision,  # type: ignore[arg-type]
        lora=lora,
        lora_scale=lora_scale,
        notify=say,
    )


def sampling_of(
    default: "Sampling | None" = None,
    *,
    guidance: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    candidates: int | None,
    guidance_stop: float | None = None,
    window: int | None = None,
) -> "Sampling":
    """The pipeline's settings, or others, with what was asked for in their place."""
    from dataclasses import replace

    from mars.pipeline.orders import DEFAULT_SAMPLING

    asked: dict[str, Any] = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "candidates": candidates,
        "guidance_stop": guidance_stop,
        "window": window,
    }
    return replace(default or DEFAULT_SAMPLING, **{name: value for name, value in asked.items() if value is not None})
