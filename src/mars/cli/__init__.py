"""The command line. Heavy imports happen inside the commands, so that `mars --help` is instant."""

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: waiting threads sleep

import typer
from typer.core import TyperGroup

from mars.cli.bench import bench
from mars.cli.convert import convert_app, init
from mars.cli.data import data_app
from mars.cli.edit import edit
from mars.cli.evaluation import evaluate
from mars.cli.options import (
    Candidates,
    Debug,
    Guidance,
    GuidanceStop,
    Json,
    Lora,
    LoraScale,
    Model,
    Precision,
    Scorer,
    Temperature,
    TopK,
    TopP,
    Window,
    open_pipeline,
    sampling_of,
    say,
)
from mars.cli.progress import bar
from mars.cli.prompts import prompts
from mars.cli.serve import serve
from mars.cli.upscale import upscale
from mars.cli.write import write
from mars.errors import MarsError, PromptError, RequestError

_UsageError: Any = typer.BadParameter.__bases__[0]
"""Click's; newer versions of Typer carry a Click of their own."""


class _OneLine(TyperGroup):
    """Ends with one line on Ctrl-C and on arguments that cannot be used; Typer would draw a box."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command of a click context."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("mars: interrupted")
            raise typer.Exit(130) from None
        except _UsageError as error:
            message = error.format_message()
            if len(message.splitlines()) != 1:  # the help of a group that was called without a command
                raise
            say(f"mars: {message.rstrip('.')}; see {(error.ctx or ctx).command_path} --help")
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    name="mars",
    cls=_OneLine,
    help='Text to image by a frozen language model and a trained visual expert. `mars "a red apple"` draws one.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.command()(init)
app.command()(upscale)
app.command()(edit)
app.command()(bench)
app.command()(write)
app.command()(prompts)
app.command(name="eval")(evaluate)
app.command()(serve)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input must be text in UTF-8, got byte {error.object[error.start]:#04x}") from None


def _prompts(words: list[str]) -> list[str]:
    if words == ["-"]:
        prompts = [line.strip() for line in _standard_input().splitlines() if line.strip()]
        if not prompts:
            raise PromptError("standard input must hold a prompt per line, got none")
        return prompts
    return [" ".join(words)]


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; `-` reads one prompt a line from standard input.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture file, or a folder for several.")] = Path(
        "mars.png"
    ),
    n: Annotated[int, typer.Option("--n", "-n", help="Pictures per prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same picture.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: what the model was trained on.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    guidance: Guidance = None,
    guidance_stop: GuidanceStop = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    candidates: Candidates = None,
    scorer: Scorer = "likelihood",
    window: Window = None,
    negative: Annotated[str, typer.Option(help="What guidance moves away from.")] = "",
    upscale: Annotated[bool, typer.Option("--upscale", help="Draw each picture again in more detail.")] = False,
    model: Model = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures for a prompt, in English or Chinese."""
    from mars.cli.drawing import draw_all, save, targets
    from mars.pipeline.scoring import find_scorer

    prompts = _prompts(prompt)
    sampling = sampling_of(
        guidance=guidance, guidance_stop=guidance_stop, temperature=temperature, top_k=top_k, top_p=top_p,
        candidates=candidates, window=window,
    )  # fmt: skip
    files = targets(out, n * len(prompts))
    pipe = open_pipeline(model, precision=precision, lora=lora, lora_scale=lora_scale)
    pictures: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    with bar("drawing") as progress:
        for drawn in draw_all(
            pipe, prompts, n=n, seed=seed, size=(width, height), negative=negative, sampling=sampling,
            scorer=find_scorer(pipe, scorer), upscale=upscale, progress=progress,
        ):  # fmt: skip
            written = list(islice(files, len(drawn.images)))
            save(drawn, written)
            seconds = {name: seconds.get(name, 0.0) + value for name, value in drawn.seconds.items()}
            for file, text, number in zip(written, drawn.prompts, drawn.seeds, strict=True):
                pictures.append({"file": str(file), "prompt": text, "seed": number})
                if not as_json:
                    typer.echo(f"{file}  (seed {number})")
    if as_json:
        typer.echo(json.dumps({"pictures": pictures, "seconds": seconds}, ensure_ascii=False))


@app.command()
def caption(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
    model: Model = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a picture shows."""
    from mars.picture import open_picture

    picture = open_picture(image)
    text = open_pipeline(model, precision=precision).caption(picture, language=lang)
    typer.echo(json.dumps({"file": str(image), "caption": text}, ensure_ascii=False) if as_json else text)


@app.command()
def chat(
    text: Annotated[list[str], typer.Argument(help="What to say; `-` reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    model: Model = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to the base language model, which painting has not changed."""
    said = _standard_input() if text == ["-"] else " ".join(text)
    if not said.strip():
        raise PromptError("the text must not be empty; say something")
    if as_json:
        answer = open_pipeline(model, precision=precision).chat(said, max_tokens=max_tokens)
        typer.echo(json.dumps({"text": said, "answer": answer}, ensure_ascii=False))
        return
    open_pipeline(model, precision=precision).chat(
        said, max_tokens=max_tokens, emit=lambda piece: typer.echo(piece, nl=False)
    )
    typer.echo()


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="A model's folder; default: the one that comes along.")] = None,
    preset: Annotated[str | None, typer.Option(help="Sizes and costs of a known shape, such as qwen-7b.")] = None,
    gpu: Annotated[str, typer.Option(help="With --preset: what training is planned for.")] = "a100",
    utilisation: Annotated[float | None, typer.Option(help="With --preset: share of the GPU's peak.")] = None,
    pairs: Annotated[list[int] | None, typer.Option(help="With --preset: pairs of a stage; thrice.")] = None,
    precision: Precision = "fp16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's parts, vocabulary, digests and memory, or what a known shape would cost."""
    if preset is not None:
        from mars.cli.preset import describe_preset, render_preset

        if model is not None:
            raise RequestError(f"name a model or a preset, not both, got {model} and {preset}")
        asked: dict[str, Any] = {"utilisation": utilisation, "pairs": pairs}
        figures = describe_preset(preset, gpu=gpu, **{name: value for name, value in asked.items() if value})
        typer.echo(json.dumps(figures, ensure_ascii=False) if as_json else render_preset(figures))
        return
    table = open_pipeline(model, precision=precision).describe()
    if as_json:
        typer.echo(json.dumps(table, ensure_ascii=False))
        return
    width = max(map(len, table))
    for key, value in table.items():
        typer.echo(f"{key:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see configs/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Replace a value, as section.key=value.")] = None,
    debug: Debug = False,
) -> None:
    """Train an image tokenizer or a stage of a model; run again to continue."""
    from mars.cli.training import start_training

    start_training(config, overrides or [], say=say, bar=bar)


def _with_default_command(arguments: list[str]) -> list[str]:
    """`mars "a red apple"`, `mars --seed 1 "a red apple"` and `mars -` mean `mars generate ...`."""
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups if isinstance(group.name, str)}
    if not arguments or arguments[0] in {*known, "--help"}:
        return arguments
    return ["generate", *arguments]


def main() -> None:
    """Runs the command line: an error is one line and exit code 1 or 2 (a traceback with --debug)."""
    arguments = sys.argv[1:]
    try:
        app(_with_default_command(arguments))
    except MarsError as error:
        if "--debug" in arguments:
            raise
        say(f"mars: {error}")
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if "--debug" in arguments or (error.name or "mars").split(".")[0] == "mars":
            raise
        say(f"mars: this needs the package {error.name}, which is not installed; run: pip install 'mars-t2i[all]'")
        sys.exit(1)
    except OSError as error:
        if "--debug" in arguments:
            raise
        where = f"{error.filename}: " if error.filename else ""
        say(f"mars: {where}{error.strerror or error}")
        sys.exit(1)
