"""The page: MARS for a person, in English and Chinese. Needs Gradio; nothing else in the server does."""

import atexit
import os
import shutil
import tempfile

from fastapi import FastAPI

from mars.server.service import Service


def add_page(app: FastAPI, service: Service) -> None:
    """Puts the page into the server's app."""
    if "GRADIO_TEMP_DIR" not in os.environ:  # else it makes a folder that other users of the machine may own
        folder = tempfile.mkdtemp(prefix="mars-page-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = folder
    from mars.server.page.mount import mount  # Gradio takes seconds to import, and reads its variables then

    mount(app, service)
