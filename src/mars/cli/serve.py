"""`mars serve`: the OpenAI API over HTTP."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated

import typer

from mars.cli.options import Debug, Lora, LoraScale, Model, Precision, open_pipeline, say

if TYPE_CHECKING:
    from mars.pipeline import MarsPipeline
    from mars.server.settings import Settings


def serve(
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with an API key a line; MARS_API_KEYS in the environment adds to it.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Pictures and texts that may wait or run; beyond, 429.", min=1)] = 64,
    max_n: Annotated[int, typer.Option(help="Pictures of one request.", min=1)] = 10,
    max_body: Annotated[int, typer.Option(help="Bytes of one request.", min=1)] = 10_000_000,
    max_pixels: Annotated[int, typer.Option(help="Of a picture that is sent.", min=1)] = 16_000_000,
    max_prompt: Annotated[int, typer.Option(help="Characters of a prompt, or of a chat.", min=1)] = 8_000,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 300.0,
    moderation: Annotated[
        str | None, typer.Option(help="package.module:name of what looks at prompts and pictures.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    engine: Annotated[
        str, typer.Option(help="Who draws: this process (local), or replicas by Ray Serve (ray), see RAY_ADDRESS.")
    ] = "local",
    replicas: Annotated[int | None, typer.Option(help="With Ray: at least so many, a core each.", min=1)] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="With Ray: up to so many, while much is asked for.", min=1)
    ] = None,
    model: Model = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    precision: Precision = "fp16",
    debug: Debug = False,
) -> None:
    """Answer HTTP requests as the OpenAI API does: pictures, edits, variations and chats."""
    from mars.config import find_callable
    from mars.memory import keep_little
    from mars.server.serve import bind
    from mars.server.settings import Limits, Settings, read_keys

    keep_little()
    _check_engine(engine, replicas, max_replicas)
    limits = Limits(
        body=max_body, pixels=max_pixels, prompt=max_prompt, images=max_n, queue=queue, seconds=timeout,
        requests=max(Limits.requests, 2 * queue),
    )  # fmt: skip
    settings = Settings(
        limits=limits,
        keys=read_keys(api_keys, environment=os.environ),
        log_prompts=log_prompts,
        moderation=None if moderation is None else find_callable(moderation, what="moderation must be"),
        page=page and find_spec("gradio") is not None,
    )
    listening = bind(host, port)
    if not settings.keys and not host.startswith("127.") and host not in ("localhost", "::1"):
        say("mars: anybody who reaches this server may use it; give API keys with --api-keys")
    if page and not settings.page:
        say("mars: the page needs Gradio (pip install 'mars-t2i[server]'); the API is served without it")
    if model is not None and Path(model).exists():
        model = str(Path(model).resolve())  # replicas have other working folders
    opening = partial(open_pipeline, model, precision=precision, lora=lora and lora.resolve(), lora_scale=lora_scale)
    with listening:
        _run(opening, listening, settings, engine=engine, replicas=replicas or 1, max_replicas=max_replicas or 1)


def _check_engine(engine: str, replicas: int | None, max_replicas: int | None) -> None:
    from mars.errors import RequestError

    if engine not in ("local", "ray"):
        raise RequestError(f"the engine must be local or ray, got {engine}")
    if engine == "local" and (replicas or max_replicas):
        raise RequestError("replicas are for --engine ray; leave them out, or choose it")
    if max_replicas and max_replicas < (replicas or 1):
        raise RequestError(f"max-replicas must be at least replicas ({replicas or 1}), got {max_replicas}")


def _run(
    opening: "Callable[[], MarsPipeline]",
    listening: socket,
    settings: "Settings",
    *,
    engine: str,
    replicas: int,
    max_replicas: int,
) -> None:
    from mars.server.serve import answer, serve

    if engine == "local":
        serve(opening(), listening, settings)
        return
    from mars.server.ray_engine import ray_worker

    queue = settings.limits.queue
    with ray_worker(opening, queue=queue, replicas=replicas, max_replicas=max(replicas, max_replicas)) as worker:
        answer(worker, listening, settings)
