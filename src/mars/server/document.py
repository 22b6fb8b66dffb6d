"""The OpenAPI document: FastAPI's, with the limits of this server and its model in the schemas."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mars.generation.sampling import MAX_CANDIDATES
from mars.server.examples import REFUSALS
from mars.server.service import Service

FORMS = ("EditForm", "VariationForm")


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """What an app answers to, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, methods in found["paths"].items():
            for method in methods.values():
                method["responses"].pop("422", None)  # it is never sent
                if path.startswith("/v1/"):
                    _guard(method, with_keys=bool(service.settings.keys))
        if service.settings.keys:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, schema in found["components"]["schemas"].items():
            _narrow(schema, limits=_limits(service), form=name in FORMS)
        said = found["components"]["schemas"]["GenerationRequest"]["properties"]["prompt"]
        said |= {"minLength": 1, "pattern": r"^[^\x00]*[^\s\x00][^\x00]*$"}
        app.openapi_schema = found
    return app.openapi_schema


def _guard(method: dict[str, Any], *, with_keys: bool) -> None:
    """What every request with a key passes."""
    refused = (401, 408, 413, 429) if with_keys else (408, 413, 429)
    for status in refused:
        method["responses"].setdefault(str(status), REFUSALS[status])
    if with_keys:
        method["security"] = [{"key": []}]
    else:
        method["responses"].pop("401", None)


def _limits(service: Service) -> dict[str, dict[str, Any]]:
    limits = service.settings.limits
    return {
        "model": {"enum": [service.name]},
        "size": {"enum": ["auto", *(f"{width}x{height}" for width, height in service.pipe.sizes)]},
        "n": {"maximum": limits.images},
        "candidates": {"maximum": MAX_CANDIDATES},
        "max_images": {"maximum": limits.images},
        "max_tokens": {"maximum": limits.tokens},
        "max_completion_tokens": {"maximum": limits.tokens},
        "prompt": {"maxLength": limits.prompt},
        "negative_prompt": {"maxLength": limits.prompt},
    }


def _narrow(schema: dict[str, Any], *, limits: dict[str, dict[str, Any]], form: bool) -> None:
    """Adds limits to the fields of a schema; a form cannot say null."""
    for name, field in schema.get("properties", {}).items():
        kinds = field.get("anyOf", [field])
        for kind in kinds:
            if kind.get("type") not in ("null", None) and "const" not in kind:
                kind.update(limits.get(name, {}))
        if form and "anyOf" in field:
            (kind,) = [kind for kind in kinds if kind.get("type") != "null"]
            del field["anyOf"]
            field.update(kind)
