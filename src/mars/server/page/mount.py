"""Builds the page with Gradio and mounts it."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
from fastapi import FastAPI

from mars.server.page.door import Door
from mars.server.page.layout import build
from mars.server.page.look import theme
from mars.server.page.words import LANGUAGES
from mars.server.service import Service

PAUSE = 0.02
"""Seconds between two looks of Gradio's queue for something to do: with its own millisecond a core never rests."""
SESSIONS = 64
"""Of how many pages Gradio remembers what they sent; nothing of ours asks for it again."""


def mount(app: FastAPI, service: Service) -> None:
    """A page for each language, and the way to it from `/`."""
    gradio = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    async def make() -> list[gr.Blocks]:
        return [_mounted(gradio, service, language) for language in LANGUAGES]

    with ThreadPoolExecutor(1) as pool:  # where no loop runs, Gradio makes many that it never closes
        pages = pool.submit(asyncio.run, make()).result()

    async def start() -> None:
        for page in pages:
            page.run_startup_events()
            await page.run_extra_startup_events()

    functions = frozenset(number for number, one in pages[0].fns.items() if one.fn is not None)  # as of all languages
    app.add_middleware(Door, page=gradio, start=start, functions=functions, keys=service.settings.keys)


def _mounted(gradio: FastAPI, service: Service, language: str) -> gr.Blocks:
    page = build(service, language)
    page.state_session_capacity = SESSIONS
    queue = page._queue
    queue.sleep_when_free = PAUSE
    queue.progress_update_sleep_when_free = 60.0  # there is no progress but what the page itself tells
    queue.ANAYLTICS_CACHE_FREQUENCY = sys.maxsize  # no table of what was asked, which pandas would make each time
    queue.ANALYTICS_MAX_EVENTS = 1
    gr.mount_gradio_app(
        gradio, page, path=f"/{language}", theme=theme(), footer_links=[], run_history=False, show_error=False,
        ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return page
