"""Puts the page into the server's app."""

import gradio as gr
from fastapi import FastAPI

from mars.server.page.door import Door
from mars.server.page.layout import build
from mars.server.page.look import theme
from mars.server.page.words import LANGUAGES
from mars.server.service import Service

PAUSE = 0.02
"""Seconds between two looks of Gradio's queue for something to do: with its own millisecond it never lets a core rest."""


def add_page(app: FastAPI, service: Service) -> None:
    """A page for each language, and the way to it from `/`."""
    gradio = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    pages = [build(service, language) for language in LANGUAGES]
    for language, page in zip(LANGUAGES, pages, strict=True):
        page.state_session_capacity = 64  # it remembers what was sent, though nobody asks for it again
        page._queue.sleep_when_free = PAUSE
        page._queue.progress_update_sleep_when_free = 60.0  # there is none
        gr.mount_gradio_app(
            gradio, page, path=f"/{language}", theme=theme(), footer_links=[], run_history=False, show_error=False,
            ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
        )  # fmt: skip

    async def start() -> None:
        for page in pages:
            page.run_startup_events()
            await page.run_extra_startup_events()

    app.add_middleware(Door, page=gradio, start=start, keys=service.settings.keys)
