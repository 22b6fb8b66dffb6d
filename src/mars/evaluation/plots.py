"""The figures of a report as a picture: bars with their intervals, between floor and ceiling."""

import io
from typing import Any

from PIL import Image

COLOURS = {"en": "#4477aa", "zh": "#cc6677"}
"""Of languages; apart for the colour-blind too (Paul Tol's bright scheme)."""


def plot(report: dict[str, Any]) -> Image.Image | None:
    """A panel for retrieval, composition and captions each, as far as they were measured; None if none was.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    panels = {
        "top-1 retrieval": _named(report.get("retrieval", {}), "top1"),
        "composition": _named(report.get("composition", {}), "right"),
        "captions": _named(report.get("captions", {}), "right"),
    }
    panels = {title: rates for title, rates in panels.items() if rates}
    if not panels:
        return None
    figure = Figure(figsize=(10, 3.6 * len(panels)), dpi=100, layout="constrained")
    for axes, (title, rates) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        names = list(dict.fromkeys(name for name, _ in rates))
        for place, language in enumerate(COLOURS):
            shown = [
                (names.index(name) + 0.4 * place - 0.2, one) for (name, lang), one in rates.items() if lang == language
            ]
            places, means = [x for x, _ in shown], [one["model"] for _, one in shown]
            off = [[abs(one["model_interval"][end] - one["model"]) for _, one in shown] for end in (0, 1)]
            axes.bar(places, means, 0.36, yerr=off, color=COLOURS[language], label=language, capsize=3)
            for word, style in (("floor", ":"), ("ceiling", "-")):
                levels = [one[word] for _, one in shown]
                label = word if place == 0 else None
                axes.hlines(levels, [x - 0.18 for x in places], [x + 0.18 for x in places], "black", style, label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, 1.05)
        axes.set_ylabel(title)
        axes.legend(loc="upper right", ncols=4)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return Image.open(png)


def _named(benches: dict[str, Any], figure: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rates by name and language."""
    return {
        (name, language): figures[figure]
        for name, languages in benches.items()
        for language, figures in languages.items()
    }
