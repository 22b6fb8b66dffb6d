"""What is where on the page, in one language, and what is called when something is pressed."""

import json
from typing import Any

import gradio as gr

from mars.pipeline.orders import DEFAULT_SAMPLING
from mars.server.page.handlers import SIDES, Handlers
from mars.server.page.words import EXAMPLES, Words
from mars.server.service import Service

MOST_PICTURES = 8
"""Of one go: more do not fit on a screen."""
PICTURES = 4
"""Unless somebody says how many."""


def part(name: str, *arguments: object, inside: str = "") -> gr.HTML:
    """An element that `mars.<name>` of page.js fills; its value is JSON."""
    given = f"({json.dumps(arguments)[1:-1]})" if arguments else ""
    return gr.HTML(
        html_template=f'<div class="mars-{name}">{inside}</div>',
        js_on_load=f'mars.{name}{given}(element, props, watch, trigger); // "upscale" "recall": Gradio looks for names',
        apply_default_css=False,
    )


def build(service: Service, language: str) -> gr.Blocks:
    """The page; it is not mounted yet."""
    say = Words(language)
    handlers = Handlers(service, say)
    page = gr.Blocks(title=say("title"), analytics_enabled=False, fill_width=True)
    with page:
        part("header", inside=_header(service, say))
        with gr.Tabs(elem_classes="mars-tabs"):
            with gr.Tab(say("tab_draw"), id="draw", elem_id="tab-draw", render_children=True):
                fields, status = _draw_tab(handlers, say)
            with gr.Tab(say("tab_edit"), id="edit", elem_id="tab-edit", render_children=True):
                _edit_tab(handlers, say)
            with gr.Tab(say("tab_describe"), id="describe", elem_id="tab-describe", render_children=True):
                _describe_tab(handlers, say)
            with gr.Tab(say("tab_write"), id="write", elem_id="tab-write", render_children=True):
                _write_tab(handlers, say)
        shelf = part("shelf")
        shelf.recall(handlers.recall, [shelf], [*fields, status], **QUIET)
    page.queue(default_concurrency_limit=None, max_size=service.settings.limits.queue)
    return page


QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def _header(service: Service, say: Words) -> str:
    name = "".join(one if one.isalnum() or one in " .-_/" else f"&#{ord(one)};" for one in service.name)
    return (
        f'<span class="mars-mark" aria-hidden="true"></span><h1>MARS</h1><span class="mars-model">{name}</span>'
        f'<a class="mars-language" href="../{say.other}/" lang="{say.other}" title="{say("other_language_hint")}">'
        f'{say("other_language")}</a><button type="button" class="mars-theme" aria-label="{say("theme")}"></button>'
    )


def _cannot_upscale(service: Service, say: Words) -> str:
    return "" if service.pipe.model.info.upscale else say("cannot_upscale", model=service.name)


def _draw_tab(handlers: Handlers, say: Words) -> tuple[list[gr.components.Component], gr.HTML]:
    """Returns what `recall` fills, and where it says so."""
    service = handlers.service
    with gr.Row(elem_classes="mars-columns"):
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                label=say("prompt"), placeholder=say("prompt_hint"), lines=3, max_lines=8, elem_id="prompt",
                max_length=service.settings.limits.prompt, autofocus=True,
            )  # fmt: skip
            part("examples", EXAMPLES[say.language])
            with gr.Row(elem_classes="mars-go-row"):
                go, stop = _buttons(say, "go_draw")
            count = _count(service, say, PICTURES)
            size = _size(service, say)
            how = _settings(say)
        with gr.Column(scale=7, min_width=320):
            status = part("status")
            gallery = _gallery("drawn", service, say)
    drawing = gr.on(
        [go.click], handlers.draw, [prompt, count, size, *how], [gallery, status], **QUIET
    )  # fmt: skip
    _after(handlers, gallery, status, stop, drawing, name="drawn")
    return [prompt, *how], status


def _gallery(name: str, service: Service, say: Words) -> gr.HTML:
    return part("gallery", name, _cannot_upscale(service, say))


def _after(handlers: Handlers, gallery: gr.HTML, status: gr.HTML, stop: gr.Button, drawing: Any, *, name: str) -> None:
    """What follows a drawing: it is stopped, or one of its pictures is upscaled."""
    upscaling = gallery.upscale(
        handlers.upscale, [gallery], [gallery, status], js=f"() => [mars.picked('{name}')]", **QUIET
    )
    _stopping(handlers, stop, status, [drawing, upscaling])


def _stopping(handlers: Handlers, stop: gr.Button, status: gr.HTML, events: list[Any]) -> None:
    text = json.dumps({"kind": "done", "text": handlers.say("stopped")})
    stop.click(None, None, [status], cancels=events, js=f"() => ({text})", **QUIET)


def _buttons(say: Words, name: str) -> tuple[gr.Button, gr.Button]:
    go = gr.Button(say(name), variant="primary", elem_classes="mars-go", scale=3)
    return go, gr.Button(say("stop"), elem_classes="mars-stop", scale=1)


def _count(service: Service, say: Words, usual: int) -> gr.Slider:
    most = min(MOST_PICTURES, service.settings.limits.images)
    return gr.Slider(1, max(2, most), min(usual, most), step=1, label=say("count"), visible=most > 1)


def _size(service: Service, say: Words) -> gr.Dropdown:
    sizes = [f"{width}x{height}" for width, height in service.pipe.sizes]
    return gr.Dropdown(sizes, value=sizes[0], label=say("size"), visible=len(sizes) > 1)


def _settings(say: Words) -> list[gr.components.Component]:
    """Negative prompt, seed, guidance, temperature, top-k, top-p, candidates, as the handlers take them."""
    usual = DEFAULT_SAMPLING
    with gr.Accordion(say("settings"), open=False, elem_classes="mars-settings"):
        negative = gr.Textbox(label=say("negative"), placeholder=say("negative_hint"), max_lines=3)
        seed = gr.Textbox(label=say("seed"), placeholder=say("seed_hint"), max_lines=1)
        with gr.Row():
            guidance = gr.Slider(0, 20, usual.guidance, step=0.1, label=say("guidance"), min_width=140)
            temperature = gr.Slider(0, 2, usual.temperature, step=0.05, label=say("temperature"), min_width=140)
        with gr.Row():
            top_k = gr.Number(usual.top_k, minimum=0, precision=0, label=say("top_k"), min_width=140)
            top_p = gr.Slider(0.01, 1, usual.top_p, step=0.01, label=say("top_p"), min_width=140)
        candidates = gr.Slider(1, 64, usual.candidates, step=1, label=say("candidates"))
    return [negative, seed, guidance, temperature, top_k, top_p, candidates]


def _edit_tab(handlers: Handlers, say: Words) -> None:
    ways = [(say(f"how_{way}"), way) for way in ("paint", "extend", "vary")]
    with gr.Row(elem_classes="mars-columns"):
        with gr.Column(scale=5, min_width=320):
            painted = part("painter")
            way = gr.Radio(ways, value="paint", label=say("how"))
            with gr.Group(visible=False) as around:
                sides = gr.CheckboxGroup(
                    [(say(f"side_{side}"), side) for side in SIDES], value=["right"], label=say("sides")
                )
                margin = gr.Slider(0.1, 1, 0.5, step=0.05, label=say("margin"))
            strength = gr.Slider(0.05, 1, 0.3, step=0.05, label=say("strength"), visible=False)
            prompt = gr.Textbox(
                label=say("edit_prompt"), lines=2, max_lines=6, elem_id="edit-prompt",
                max_length=handlers.service.settings.limits.prompt,
            )  # fmt: skip
            with gr.Row(elem_classes="mars-go-row"):
                go, stop = _buttons(say, "go_edit")
            count = _count(handlers.service, say, 2)
            how = _settings(say)
        with gr.Column(scale=7, min_width=320):
            status = part("status")
            gallery = _gallery("edited", handlers.service, say)
    way.change(
        None, [way], [around, strength],
        js="(way) => ['extend', 'vary'].map((one) => ({__type__: 'update', visible: one === way}))", **QUIET,
    )  # fmt: skip
    inputs = [painted, way, prompt, sides, margin, strength, count, *how]
    editing = go.click(handlers.edit, inputs, [gallery, status], **QUIET)
    _after(handlers, gallery, status, stop, editing, name="edited")


def _describe_tab(handlers: Handlers, say: Words) -> None:
    with gr.Row(elem_classes="mars-columns"):
        with gr.Column(scale=5, min_width=320):
            picture = part("picture", "described")
            with gr.Row(elem_classes="mars-go-row"):
                go, stop = _buttons(say, "go_describe")
        with gr.Column(scale=7, min_width=320):
            status = part("status")
            captions = part("captions")
    describing = go.click(handlers.describe, [picture], [captions, status], **QUIET)
    _stopping(handlers, stop, status, [describing])


def _write_tab(handlers: Handlers, say: Words) -> None:
    service = handlers.service
    with gr.Column(elem_classes="mars-talk"):
        story = part("story")
        status = part("status")
        text = gr.Textbox(
            label=say("say"), placeholder=say("say_hint"), lines=2, max_lines=8,
            max_length=service.settings.limits.prompt,
        )  # fmt: skip
        picture = part("picture", "told")
        way = gr.Radio([(say("with_both"), "both"), (say("with_text"), "text")], value="both", label=say("answer_with"))
        most = _count(service, say, 1)
        with gr.Row(elem_classes="mars-go-row"):
            go, stop = _buttons(say, "go_write")
            anew = gr.Button(say("anew"), scale=1)
    writing = go.click(handlers.write, [story, text, picture, way, most], [story, status], **QUIET)
    writing.success(None, [status], [text, picture], js=_EMPTY_UNLESS_ERROR, **QUIET)
    anew.click(None, None, [story, status], js="() => [null, null]", **QUIET)
    _stopping(handlers, stop, status, [writing])


_EMPTY_UNLESS_ERROR = """(status) => status?.kind === "error"
    ? [{__type__: "update"}, {__type__: "update"}] : ["", null]"""
