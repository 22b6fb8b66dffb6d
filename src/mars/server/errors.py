"""Errors in the shape that OpenAI's clients turn into their typed exceptions."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mars.errors import ConfigError, ImageError, MarsError, RequestError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed",
    408: "request_timeout", 413: "request_too_large", 429: "rate_limit_exceeded", 503: "shutting_down",
    504: "timeout",
}  # fmt: skip


class ApiError(HTTPException):
    """A refusal."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=dict(headers or {}))
        self.code = code or CODES.get(status, "server_error")
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as a response."""
        return json_response(self.body, status=self.status_code, headers=self.headers)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def json_response(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: names of unknown parameters may be any text, even one that is not valid Unicode."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def refusal(error: Exception) -> ApiError:
    """What an error of the pipeline is to a client: its own fault, or ours, about which nothing is said."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | ImageError | ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, MarsError):
        return ApiError(500, str(error))
    return ApiError(500, "the server failed; its log says why, under the id of this request")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first of what does not fit the schema."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return ApiError(400, "the body must be valid JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {where}", code="unknown_parameter", param=where)
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    if first["type"] == "missing":
        return ApiError(400, f"{where} must be given", code="missing_parameter", param=where)
    return ApiError(400, f"{where}: {first['msg']}", code="invalid_value", param=where)


async def answer_validation(_request: Request, error: Exception) -> Response:
    """FastAPI's handler of bodies that do not fit."""
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def answer_http(_request: Request, error: Exception) -> Response:
    """FastAPI's handler of refusals."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this address").response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def answer_mars(_request: Request, error: Exception) -> Response:
    """FastAPI's handler of errors raised on purpose."""
    return refusal(error).response()


async def answer_gone(_request: Request, _error: Exception) -> Response:
    """FastAPI's handler where nobody waits: the status is for the log."""
    return Response(status_code=499)
