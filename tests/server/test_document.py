"""Requests made from the OpenAPI document by schemathesis: what is answered is what the document says."""

from collections import Counter
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.openapi import from_url

from mars.server.settings import Keys
from tests.server.conftest import Running, Start

load_all_checks()
REASONS = (
    "partial_images needs stream", "PNG has none", "a stream has b64_json only", "at most 512 tokens",
    "is not a picture", "is damaged or cut short", "there must be one image, got", "Expected UploadFile",
    "the last message must be the user's", "must not be empty", "must have at most 8,000 characters",
    "must be valid base64", "to caption, got", "pictures in messages must be at most", "begin with a text",
    "the text must be shorter than",
)  # fmt: skip
"""Why a request that fits the document may be refused: rules between fields, and what only a picture's bytes tell."""


def explore(url: str, *, examples: int) -> Counter[str]:
    """How often each operation answered with each status; raises where an answer is not what the document says."""
    seen: Counter[str] = Counter()
    for result in from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]
        made = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

        def ask(case: Any) -> None:
            seen[f"{case.operation.label} {_check(case, url)}"] += 1

        unhurried = settings(
            max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        seed(0)(unhurried(given(made)(ask)))()
    return seen


def _check(case: Any, url: str) -> int:
    answer = case.call(base_url=url, timeout=60)
    message = answer.json()["error"]["message"] if answer.status_code == 400 else ""
    known = any(reason in message for reason in REASONS)
    case.validate_response(answer, excluded_checks=[CHECKS.get_one("positive_data_acceptance")] if known else [])
    return int(answer.status_code)


def check(seen: Counter[str]) -> None:
    for wanted in (
        "POST /v1/images/generations 200", "POST /v1/images/generations 400", "POST /v1/images/edits 400",
        "POST /v1/images/variations 400", "POST /v1/chat/completions 200", "POST /v1/chat/completions 400",
        "GET /v1/models/{name} 404", "GET /metrics 200",
    ):  # fmt: skip
        assert seen[wanted], seen


def test_what_is_answered_is_what_the_document_says(started: Running) -> None:
    check(explore(started.url, examples=10))


@pytest.mark.slow
def test_what_is_answered_is_what_the_document_says_at_length(started: Running) -> None:
    check(explore(started.url, examples=60))


def test_the_document_knows_the_servers_limits(started: Running, start: Start) -> None:
    document = httpx2.get(f"{started.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    fields = schemas["GenerationRequest"]["properties"]
    assert [kind["enum"] for kind in fields["size"]["anyOf"] if "enum" in kind] == [["auto", "48x32"]]
    assert fields["n"]["anyOf"][0]["maximum"] == 10
    assert schemas["EditForm"]["properties"]["n"]["maximum"] == 10
    assert "anyOf" not in schemas["EditForm"]["properties"]["seed"]
    assert "401" not in document["paths"]["/v1/models"]["get"]["responses"]
    with start(keys=Keys(["key"])) as found:
        guarded = httpx2.get(f"{found.url}/openapi.json").json()
    assert {"401", "413", "429"} < guarded["paths"]["/v1/models"]["get"]["responses"].keys()
    assert "401" not in guarded["paths"]["/health"]["get"]["responses"]
