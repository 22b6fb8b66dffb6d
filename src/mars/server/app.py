"""The app: endpoints, handlers of errors, and what every request passes."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

import mars
from mars.errors import MarsError
from mars.server import chat, images
from mars.server.document import document
from mars.server.errors import (
    ApiError,
    ClientGoneError,
    answer_gone,
    answer_http,
    answer_mars,
    answer_validation,
    json_response,
)
from mars.server.guard import Guard
from mars.server.metrics import Metrics
from mars.server.page import add_page
from mars.server.service import Service
from mars.server.settings import Settings
from mars.server.worker import Intake

ABOUT = """The OpenAI API on a MARS model. Fields that OpenAI has not: `seed`, `negative_prompt`, `guidance_scale`,
`temperature`, `top_k`, `top_p`, `candidates` (in the official client: `extra_body`)."""


def make_app(worker: Intake, settings: Settings) -> FastAPI:
    """The app of a worker, which it does not start or end."""
    metrics = Metrics(worker)
    service = Service(worker, settings, metrics)
    app = FastAPI(
        title="MARS", version=mars.__version__, description=ABOUT, redoc_url=None, docs_url=None, redirect_slashes=False
    )
    app.include_router(images.routes(service))
    app.include_router(chat.routes(service))
    _add_models(app, service)
    _add_health(app, service)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(MarsError, answer_mars)
    app.add_exception_handler(ClientGoneError, answer_gone)
    if settings.page:
        add_page(app, service)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.openapi = lambda: document(app, service)  # type: ignore[method-assign]
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    about = {
        "id": service.name, "object": "model", "created": 0, "owned_by": "mars",
        "sizes": [f"{width}x{height}" for width, height in service.pipe.sizes],
        "digest": service.pipe.model.visual_digest,
    }  # fmt: skip

    @app.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The model, its sizes and its digest."""
        return json_response({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}", tags=["models"], responses={404: {"description": "There is no such model."}})
    async def model(name: str) -> Response:
        """The same for one."""
        service.check_model(name)
        return json_response(about)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["health"])
    async def health() -> Response:
        """Whether the process lives."""
        return json_response({"status": "ok"})

    @app.get("/ready", tags=["health"], responses={503: {"description": "It takes nothing more."}})
    async def ready() -> Response:
        """Whether it takes requests."""
        if not service.worker.ready:
            raise ApiError(503, "the server takes nothing more")
        return json_response({"status": "ready"})

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
