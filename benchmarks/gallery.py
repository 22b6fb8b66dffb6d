"""Pictures of a model as they come, for a page in docs: prompts chosen by a seed, nothing by hand, failures included.

    python -m benchmarks.gallery [MODEL] --pictures data/noto.tar [--upscaler MODEL] [--out docs]

Writes OUT/gallery.md and OUT/gallery/*.webp, each below 200 KB. Every section takes the first prompts that the benches
choose for this seed (`evaluation/questions.py`, `evaluation/composition.py`), and draws each once, with seeds that
count up from it. Beside each stands what a judge that never saw the model says: retrieval among 100 true pictures for
emoji, the analytic detector for scenes, the names and tags of the Unicode CLDR for captions; for edits there is none.
"""

import argparse
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mars.data.scenes import draw_scene
from mars.data.shards import Picture, read_pictures
from mars.errors import DataError
from mars.evaluation.composition import choose_tasks, is_right
from mars.evaluation.config import EmojiBench
from mars.evaluation.detector import Found, detect
from mars.evaluation.drawing import Artist, Drawing
from mars.evaluation.features import EfficientNetLite0
from mars.evaluation.metrics import ranks
from mars.evaluation.questions import LANGUAGES, SETS, Question
from mars.evaluation.report import Pair, contact_sheet
from mars.evaluation.retrieval import ask
from mars.files import whole_file
from mars.pipeline import MarsPipeline
from mars.pipeline.orders import DEFAULT_SAMPLING

MOST_BYTES = 200_000
QUALITIES = (90, 75, 60, 45, 30)
ABOUT = {
    "trained names": "Names that training saw. Below each: the true picture.",
    "held-out pictures": "Held-out pictures; with one style their names are new as well.",
    "held-out concepts": "Names that training never saw.",
    "paraphrases": "Tags of the Unicode CLDR that training never saw, of things that it did see.",
    "other wordings": "Trained names in a sentence that training never saw.",
}
"""By the sets of `questions.SETS`."""
EDITED = 4
"""Pictures that are edited, each in three ways, and that are upscaled."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of the gallery."""

    prompt: str
    seed: int | None
    verdict: str
    right: bool | None
    """Null where nobody judges."""
    drawn: Image.Image
    beside: Image.Image
    """What stands below it: the truth, or what it was made from."""


@dataclass
class Section:
    """A sheet of pictures and its table."""

    title: str
    about: str
    shown: list[Shown] = field(default_factory=list)

    @property
    def file(self) -> str:
        """The name of its sheet."""
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-") + ".webp"

    def sheet(self) -> bytes:
        """Pictures with their numbers, as WebP below `MOST_BYTES`; green lines where the judge says right."""
        pairs = [
            Pair(label=str(number), drawn=one.drawn, true=one.beside, right=bool(one.right))
            for number, one in enumerate(self.shown, 1)
        ]
        columns = max(1, 1056 // pairs[0].true.width)
        return small_webp(contact_sheet(pairs, columns=columns))

    def markdown(self) -> list[str]:
        """Heading, sheet and table."""
        judged = [one.right for one in self.shown if one.right is not None]
        score = f" {sum(judged)} of {len(judged)} right." if judged else ""
        lines = [f"## {self.title}", "", f"{self.about}{score}", "", f"![{self.title}](gallery/{self.file})", ""]
        lines += ["| | prompt | seed | verdict |", "|--:|---|--:|---|"]
        for number, one in enumerate(self.shown, 1):
            seed = "" if one.seed is None else str(one.seed)
            lines.append(f"| {number} | {_cell(one.prompt)} | {seed} | {_cell(one.verdict)} |")
        return [*lines, ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def small_webp(sheet: Image.Image) -> bytes:
    """As good as fits into `MOST_BYTES`.

    Raises:
        DataError: if it does not fit at any quality.
    """
    for quality in QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "WEBP", quality=quality)
        if file.tell() < MOST_BYTES:
            return file.getvalue()
    raise DataError(f"a sheet of {sheet.width}x{sheet.height} must fit into {MOST_BYTES} bytes; show fewer pictures")


@dataclass(frozen=True, kw_only=True)
class Curator:
    """Who fills the gallery."""

    artist: Artist
    shard: dict[str, Picture]
    count: int
    """Prompts of a section in each language."""

    def true(self, key: str) -> Image.Image:
        """A picture of the shard."""
        return Image.fromarray(self.shard[key].pixels())

    def emoji(self) -> list[Section]:
        """A section for each set of questions that the shard has."""
        asked = ask(self.shard, EmojiBench(prompts=2 * self.count), seed=self.artist.seed).questions
        groups = {name: found for name in SETS if (found := asked.get(name, [])[: self.count])}
        network = EfficientNetLite0()
        keys = sorted({key for group in groups.values() for one in group for key in one.candidates})
        true = dict(zip(keys, network.features_of(map(self.true, keys)), strict=True))
        return [
            Section(
                title=name.capitalize(),
                about=ABOUT[name] + " Verdict: the place of the true picture among 100 of its style.",
                shown=[one for language in LANGUAGES for one in self._retrieved(group, language, network, true)],
            )
            for name, group in groups.items()
        ]

    def _retrieved(
        self, group: Sequence[Question], language: str, network: EfficientNetLite0, true: dict[str, Tensor]
    ) -> list[Shown]:
        found = []
        for question, drawing in zip(group, self.artist.draw([one.prompts[language] for one in group]), strict=True):
            candidates_CD = torch.stack([true[key] for key in question.candidates])
            place = int(ranks(network.features_of([drawing.image]), candidates_CD, right=0)[0]) + 1
            verdict = "right" if place == 1 else f"place {place} of {len(question.candidates)}"
            found.append(_shown(drawing, verdict=verdict, right=place == 1, beside=self.true(question.key)))
        return found

    def scenes(self) -> Section:
        """Combinations that training never saw, judged by the detector."""
        width, height = self.artist.pipe.sizes[0]
        if width != height:
            raise DataError(f"scenes are squares, but the model draws {width}x{height}")
        section = Section(
            title="Scenes in unseen combinations",
            about="Shapes in colours, sizes, numbers and places that training never saw together. Verdict: what the "
            "detector finds.",
        )
        for tasks in choose_tasks(count=max(1, self.count // 4), seed=self.artist.seed, size=width).values():
            for language in LANGUAGES:
                drawings = self.artist.draw([task.prompt(language) for task in tasks])
                for task, drawing in zip(tasks, drawings, strict=True):
                    found = detect(drawing.image)
                    right = is_right(task, found)
                    verdict = f"{task.category} {'right' if right else 'wrong'}: {_told(found)}"
                    section.shown.append(_shown(drawing, verdict=verdict, right=right, beside=draw_scene(task.scene)))
        return section

    def captions(self) -> Section:
        """What the model says of true pictures, of trained ones and of held-out ones."""
        section = Section(
            title="Captions of true pictures",
            about="Pictures of the data set, trained ones and held-out ones, described in both languages. Right: the "
            "name or a tag of the Unicode CLDR. The upper picture is what the image tokenizer leaves of the lower.",
        )
        for split in ("train", "picture"):
            keys = sorted(key for key, one in self.shard.items() if one.record.split == split)
            order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(self.artist.seed))
            for key in [keys[place] for place in order[: max(1, self.count // 2)].tolist()]:
                picture, (seen,) = self.true(key), self.artist.rebuild([self.true(key)])
                for language in LANGUAGES:
                    said = self.artist.pipe.caption(picture, language=language)
                    names = names_of(self.shard[key], language)
                    right = is_name(said, names)
                    verdict = f"{'right' if right else 'wrong'}: “{said}”"
                    section.shown.append(
                        Shown(
                            prompt=f"({split}) {names[0] if names else key}",
                            seed=None,
                            verdict=verdict,
                            right=right,
                            drawn=seen,
                            beside=picture,
                        )
                    )
        return section

    def edits(self) -> Section:
        """The first trained names, drawn and then edited in three ways."""
        section = Section(
            title="Edits",
            about="Below each the picture before. Its right half is drawn anew for the next prompt; or margins around "
            "it are filled; or a third of its codes are drawn anew. Nobody judges these.",
        )
        for drawing, other in pairwise(self._first_drawings(EDITED + 1)):
            before = drawing.image
            mask = Image.new("L", before.size, 0)
            mask.paste(255, (before.width // 2, 0, *before.size))
            edge = min(before.size) // 4
            ways: list[tuple[str, Drawing, dict[str, Any]]] = [
                ("right half drawn anew", other, {"mask": mask}),
                ("margins filled", drawing, {"margins": (edge, edge, edge, edge)}),
                ("a third drawn anew", drawing, {"vary": 1 / 3}),
            ]
            for way, asked, how in ways:
                edited = self.artist.pipe.edit(
                    before, asked.prompt, seed=asked.seed, sampling=self.artist.sampling, **how
                )
                section.shown.append(_shown(asked, verdict=way, right=None, beside=before, drawn=edited.images[0]))
        return section

    def upscaled(self, upscaler: MarsPipeline) -> Section:
        """The first trained names, drawn and then drawn again, larger."""
        section = Section(
            title="Upscaled",
            about="Drawn again, larger. Below each the same picture enlarged by bicubic interpolation.",
        )
        for drawing in self._first_drawings(EDITED):
            large = upscaler.upscale(drawing.image, prompt=drawing.prompt, seed=drawing.seed).images[0]
            smooth = drawing.image.resize(large.size, Image.Resampling.BICUBIC)
            verdict = f"{drawing.image.width} to {large.width} pixels"
            section.shown.append(_shown(drawing, verdict=verdict, right=None, beside=smooth, drawn=large))
        return section

    def _first_drawings(self, count: int) -> list[Drawing]:
        group = ask(self.shard, EmojiBench(prompts=2 * self.count), seed=self.artist.seed).questions["trained names"]
        return self.artist.draw([one.prompts["en"] for one in group[:count]])


def _shown(
    drawing: Drawing, *, verdict: str, right: bool | None, beside: Image.Image, drawn: Image.Image | None = None
) -> Shown:
    return Shown(
        prompt=drawing.prompt,
        seed=drawing.seed,
        verdict=verdict,
        right=right,
        drawn=drawn or drawing.image,
        beside=beside,
    )


def _told(found: Sequence[Found]) -> str:
    return ", ".join(f"{one.colour or 'unclear'} {one.shape or 'shape'}" for one in found) or "nothing"


def names_of(picture: Picture, language: str) -> list[str]:
    """The name and all tags in a language, those that training never saw too."""
    found: list[str] = []
    for kind in ("name", "tags", "paraphrase"):
        for caption in picture.record.captions:
            if (caption.language, caption.kind) == (language, kind):
                found += [caption.text] if kind == "name" else re.split("[,，]", caption.text)
    return [name.strip() for name in found]


def is_name(said: str, names: Sequence[str]) -> bool:
    """Whether what was said is one of the names, or begins with one before a comma (a style may follow)."""
    known = {name.casefold() for name in names}
    return bool({said.strip().casefold(), re.split("[,，]", said)[0].strip().casefold()} & known)


def write_gallery(out: Path, sections: Sequence[Section], *, about: str) -> None:
    """The page and its sheets."""
    for section in sections:
        with whole_file(out / "gallery" / section.file, error=DataError) as partial:
            partial.write_bytes(section.sheet())
    lines = ["# Gallery", "", about, "", *[line for section in sections for line in section.markdown()]]
    with whole_file(out / "gallery.md", error=DataError) as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws and writes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model's folder; without, the one that comes with the package")
    parser.add_argument("--pictures", type=Path, default=Path("data/noto.tar"))
    parser.add_argument("--upscaler", help="a model that upscales; without, MODEL if it can")
    parser.add_argument("--count", type=int, default=8, help="prompts of a section in each language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args(arguments)
    pipe = MarsPipeline.from_pretrained(given.model)
    artist = Artist(pipe=pipe, sampling=DEFAULT_SAMPLING, seed=given.seed)
    shard = {one.record.key: one for one in read_pictures(given.pictures)}
    curator = Curator(artist=artist, shard=shard, count=given.count)
    sections = [*curator.emoji(), curator.scenes(), curator.captions(), curator.edits()]
    upscaler = MarsPipeline.from_pretrained(given.upscaler) if given.upscaler else pipe
    if upscaler.model.info.upscale is not None:
        sections.append(curator.upscaled(upscaler))
    about = (
        f"Pictures of {pipe.model.info.name} ({pipe.model.visual_digest[:19]}) as they came, made by "
        f"`python -m benchmarks.gallery`: prompts are those that the benches choose for seed {given.seed}; none was "
        "left out, and each was drawn once, with the pipeline's own sampling; failures are meant to be seen. A green "
        "line between a picture and what stands below it says that the judge found it right."
    )
    write_gallery(given.out, sections, about=about)


if __name__ == "__main__":
    main()
