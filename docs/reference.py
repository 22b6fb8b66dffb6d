"""Pages of the docs site that are not written in docs/: the repository's own, and what the code says of itself.

mkdocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`). The Python and configuration pages are
mkdocstrings' and lie in docs/reference/.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "NOTICE": "notice.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
"""Files of the repository that are pages of the site, and what they are called there."""
_LINK = re.compile(r"(\]\()((?:\.\./)*)([\w./-]+)((?:#[\w-]+)?\))")
_LONGEST_EXAMPLE = 600


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=site_links((ROOT / source).read_text("utf-8"))))
    document = shipped_document()
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "reference/http.md", content=http_page(document)))
    files.append(File.generated(config, "reference/openapi.json", content=json.dumps(document, indent=1)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Pages in docs/ link to files beside docs/, which are pages of the site under other names."""
    return site_links(markdown)


def site_links(markdown: str) -> str:
    """Links between files of the repository become links between pages."""

    def moved(match: re.Match[str]) -> str:
        begin, up, path, end = match.groups()
        if path in ELSEWHERE:
            return f"{begin}{ELSEWHERE[path]}{end}"
        return f"{begin}{up}{path.removeprefix('docs/')}{end}"

    return _LINK.sub(moved, markdown)


def command_line() -> str:
    """Every command with its options, as Typer writes them."""
    from mars.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="mars")


def shipped_document() -> dict[str, Any]:
    """The OpenAPI document of a server with the shipped model."""
    from mars.pipeline import MarsPipeline
    from mars.server.app import make_app
    from mars.server.settings import Settings
    from mars.server.worker import Worker

    worker = Worker(MarsPipeline.from_pretrained(), queue=1)
    try:
        return make_app(worker, Settings()).openapi()
    finally:
        worker.close()
        worker.join()


def http_page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as a page: per address what it does, its fields, an example and what may come back."""
    parts = ["# HTTP", document["info"]["description"], "The whole document: [openapi.json](openapi.json)."]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation, document)
    used = sorted(set(re.findall(r"\]\(#([a-z]+)\)", "\n".join(parts))))
    schemas = {name.lower(): name for name in document.get("components", {}).get("schemas", {})}
    parts.append("## Parts of requests")
    for name in used:  # parts of parts follow at once
        parts += _parts_of(schemas[name], document, seen=set(used))
    return "\n\n".join(parts) + "\n"


def _parts_of(name: str, document: Mapping[str, Any], *, seen: set[str]) -> Iterator[str]:
    table = _fields(document["components"]["schemas"][name])
    yield f"### {name}"
    yield table
    schemas = {name.lower(): name for name in document["components"]["schemas"]}
    for further in sorted(set(re.findall(r"\]\(#([a-z]+)\)", table)) - seen):
        seen.add(further)
        yield from _parts_of(schemas[further], document, seen=seen)


def _operation(heading: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {heading}"
    yield operation.get("description", operation["summary"])
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        schema = body["schema"]
        if "$ref" in schema:
            schema = document["components"]["schemas"][_name(schema)]
        yield f"Request, `{kind}`:"
        yield _fields(schema)
        for title, example in body.get("examples", {}).items():
            text = json.dumps(example["value"], ensure_ascii=False, indent=2)
            if len(text) <= _LONGEST_EXAMPLE:
                yield f"Example: {title}"
                yield f"```json\n{text}\n```"
    answers = operation["responses"].items()
    yield "\n".join(
        ["| status | answer |", "|---|---|", *(f"| {code} | {said['description']} |" for code, said in answers)]
    )


def _fields(schema: Mapping[str, Any]) -> str:
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _code(field.get("default"))
        about = " ".join(field.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field)} | {default} | {about} |")
    return "\n".join(rows)


def _type(schema: Mapping[str, Any]) -> str:
    """The type of a field in words, with its limits; null is left out, as every field that has it may be left out."""
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(_code, schema["enum"]))
    if "const" in schema:
        return _code(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    kind = "file" if schema.get("format") == "binary" or "contentMediaType" in schema else schema.get("type", "any")
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {_number(schema[key])}" for key, sign in limits.items() if key in schema]
    return " ".join([kind, ", ".join(told)]).strip()


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"].rsplit("/", 1)[1])


def _code(value: object) -> str:
    return "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"
