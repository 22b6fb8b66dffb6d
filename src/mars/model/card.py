"""The page that goes with a model's folder: README.md with the front matter that the hub reads.

It says what the files say, measured figures only from a report of the same weights, and nothing of the machine that
wrote it. It neither reads nor writes a file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mars.errors import DataError, ModelError
from mars.hub import is_hub_id
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.model.config import ModelConfig, UpscaleConfig
from mars.model.costs import count_parameters, meta_image_tokenizer, meta_transformer

TAGS = ("mars", "image-to-text", "autoregressive", "vq-gan")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a page says beside the shapes."""

    name: str
    language: str
    """Where the LLM comes from, as `open_base_llm` takes it; of a path only the last part is shown."""
    language_digest: str
    visual_digest: str
    grids: Sequence[tuple[int, int]]
    """(rows, columns) of codes that it was trained on."""
    upscale: UpscaleConfig | None = None
    """How it was trained to draw its grids again, larger."""
    base_model: str | None = None
    """The LLM's id on the hub, where it has one."""
    hub_id: str | None = None
    """The model's own id on the hub, where it has one."""
    licence: str | None = None
    """The hub's name of a licence, such as `apache-2.0`; without one the page names none."""
    languages: Sequence[str] = ("en", "zh")
    """Of prompts and captions."""
    includes_language: bool = False
    """Whether the LLM's weights are in the folder."""


def base_model_of(language: str) -> str | None:
    """The hub id in an LLM's source, None for a package, a file or a folder."""
    return language if is_hub_id(language) and not Path(language).exists() else None


def model_card(
    config: ModelConfig,
    facts: CardFacts,
    *,
    image_tokenizer: ImageTokenizerConfig,
    report: Mapping[str, Any] | None = None,
    about: str | None = None,
) -> str:
    """The whole page, front matter first.

    Args:
        report: what `report.json` of `mars eval` holds.
        about: what files cannot say, as Markdown: training data and their licences, what it is for.

    Raises:
        DataError: if the report is none of `mars eval`.
        ModelError: if it is of other weights.
    """
    parts = [
        _front_matter(facts),
        f"# {_line(facts.name)}",
        "Pictures from prompts by a frozen language model and a trained visual expert, and captions from pictures: "
        "an independent implementation of MARS ([arXiv 2407.07614](https://arxiv.org/abs/2407.07614)), "
        "whose authors released no weights. No figure on this page is the paper's.",
        _use(facts),
        _description(config, facts, image_tokenizer=image_tokenizer),
    ]
    if report is not None:
        parts.append(_evaluation(report, visual_digest=facts.visual_digest))
    if about is not None:
        parts.append(about.strip())
    parts.append(_limits(facts))
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    """Free text as one line."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _front_matter(facts: CardFacts) -> str:
    """YAML; every value is written as JSON, which YAML contains."""
    fields: dict[str, Any] = {"language": list(facts.languages)}
    if facts.licence is not None:
        fields["license"] = facts.licence
    fields |= {"library_name": "mars-t2i", "pipeline_tag": "text-to-image"}
    if facts.base_model is not None:
        fields["base_model"] = facts.base_model
    fields["tags"] = list(TAGS)
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _use(facts: CardFacts) -> str:
    source = json.dumps(facts.hub_id or "path/of/this/folder", ensure_ascii=False)
    return f"""```python
from mars import MarsPipeline  # the package mars-t2i

pipe = MarsPipeline.from_pretrained({source})
pipe("a red apple", seed=1).images[0].save("apple.png")
```"""


def _language_name(facts: CardFacts) -> str:
    if facts.base_model is not None:
        return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    if facts.language.startswith("package:"):
        return f"the Python package {facts.language.removeprefix('package:')}"
    return PurePath(facts.language.replace("\\", "/")).name or "unnamed"


def _description(config: ModelConfig, facts: CardFacts, *, image_tokenizer: ImageTokenizerConfig) -> str:
    transformer, factor = meta_transformer(config), image_tokenizer.factor
    counts, vocabulary = count_parameters(transformer), transformer.vocabulary
    visual = counts["visual layers"] + counts["visual tables"]
    pictures = sum(weight.numel() for weight in meta_image_tokenizer(image_tokenizer).parameters())
    layers = f"{len(config.visual_layers)} of {config.language.num_layers} layers"
    if (cell := config.semvie.cell) > 1:
        layers += f", {cell}x{cell} codes a position"
    sizes = ", ".join(f"{columns * factor}x{rows * factor}" for rows, columns in facts.grids)
    rows = {
        "Language expert (frozen)": f"{_language_name(facts)}, "
        f"{counts['language layers'] + counts['language tables']:,} parameters",
        "Visual expert (trained)": f"{visual:,} parameters, width {config.visual_width:,}, {layers}",
        "Image tokenizer": f"{pictures:,} parameters, {image_tokenizer.num_codes:,} codes of {factor}x{factor} pixels",
        "Picture sizes": sizes,
        "Super-resolution": "none" if facts.upscale is None else facts.upscale.text(facts.grids, factor=factor),
        "Vocabulary": f"{vocabulary.size:,} ids: {vocabulary.text_size:,} of text, {vocabulary.num_codes:,} codes, "
        f"{vocabulary.size - vocabulary.first_special} special and unused",
        "Visual digest": f"`{facts.visual_digest}`",
        "Language digest": f"`{facts.language_digest}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())])


def _evaluation(report: Mapping[str, Any], *, visual_digest: str) -> str:
    try:
        found, settings = report["model"]["visual_digest"], report["settings"]
        lines = [
            "## Evaluation",
            "",
            f"Top-1 retrieval of the true picture among {settings['candidates']} of its own style, with 95 % bootstrap "
            "intervals, by `mars eval`. Floor: pictures drawn for the empty prompt. Ceiling: the image tokenizer's "
            f"reconstructions. Sampling {json.dumps(settings['sampling'])}, seed {settings['seed']}, candidates chosen "
            f"by {settings.get('scorer', 'likelihood')}.",
            *_table("prompts", report["retrieval"], rate="top1"),
        ]
        if "composition" in report:
            lines += [
                "",
                "Scenes in combinations that training never saw, judged by an analytic detector. Floor: pictures of "
                "other prompts. Ceiling: the image tokenizer's reconstructions.",
                *_table("category", report["composition"], rate="right"),
            ]
        if "captions" in report:
            lines += [
                "",
                "Captions of true pictures, right if they begin with the picture's name or one of its CLDR keywords; "
                "of unseen scenes, if all that they say is so. Floor: captions of other pictures.",
                *_table("pictures", report["captions"], rate="right", count="pictures"),
            ]
        codec = report["image_tokenizer"]
        lines += [
            "",
            f"Image tokenizer: {codec['psnr']:.2f} dB PSNR on {codec['held_out_pictures']} held-out pictures, "
            f"{codec['usage']:.0%} of the codebook in use.",
        ]
        lines += ["", *(f"- {_line(note)}" for note in report["notes"])] if report["notes"] else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the report must be a report.json of `mars eval`, got one where {error!r}; evaluate the model again"
        ) from None
    if found != visual_digest:
        raise ModelError(
            f"the report must be of this model, {visual_digest[:19]}, got one of {str(found)[:19]}; evaluate it again"
        )
    return "\n".join(lines)


def _table(first: str, groups: Mapping[str, Any], *, rate: str, count: str = "prompts") -> list[str]:
    """A line for each group and language, after an empty one."""
    lines = ["", f"| {first} | language | n | model | floor | ceiling |", "|---|---|--:|--:|--:|--:|"]
    for name, languages in groups.items():
        for language, figures in languages.items():
            lines.append(f"| {_cell(name)} | {_cell(language)} | {figures[count]} | {_rates(figures[rate])} |")
    return lines


def _rates(figures: Mapping[str, Any]) -> str:
    low, high = figures["model_interval"]
    return f"{figures['model']:.1%} ({low:.1%}..{high:.1%}) | {figures['floor']:.1%} | {figures['ceiling']:.1%}"


def _limits(facts: CardFacts) -> str:
    lines = ["## Limits", ""]
    if not facts.includes_language:
        lines.append(
            "- The language model is not in this folder. It is opened from where it comes, and refused if its digest "
            "is another."
        )
    lines += [
        "- It draws the sizes above and no others, and what its training pictures showed.",
        "- Text in, text out is the language model itself, unchanged, with its own abilities, biases and licence.",
    ]
    if facts.licence is None:
        lines.append("- No licence was named when this page was written.")
    return "\n".join(lines)
