"""`mars serve`: the OpenAI API over HTTP."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mars.cli.options import Debug, Lora, LoraScale, Model, Precision, open_pipeline, say


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
    model: Model = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    precision: Precision = "fp16",
    debug: Debug = False,
) -> None:
    """Answer HTTP requests as the OpenAI API does: pictures, edits, variations and chats."""
    from mars.server.serve import bind
    from mars.server.serve import serve as run
    from mars.server.settings import Limits, Settings, find_moderation, read_keys

    limits = Limits(
        body=max_body, pixels=max_pixels, prompt=max_prompt, images=max_n, queue=queue, seconds=timeout
    )  # fmt: skip
    settings = Settings(
        limits=limits,
        keys=read_keys(api_keys, environment=os.environ),
        log_prompts=log_prompts,
        moderation=None if moderation is None else find_moderation(moderation),
        page=page and find_spec("gradio") is not None,
    )
    with bind(host, port) as listening:
        if not settings.keys and not host.startswith("127.") and host not in ("localhost", "::1"):
            say("mars: anybody who reaches this server may use it; give API keys with --api-keys")
        if page and not settings.page:
            say("mars: the page needs Gradio (pip install 'mars-t2i[server]'); the API is served without it")
        run(open_pipeline(model, precision=precision, lora=lora, lora_scale=lora_scale), listening, settings)
