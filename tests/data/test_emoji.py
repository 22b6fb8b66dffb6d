import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mars.data import emoji
from mars.data.emoji import CLDR, REQUESTS, SETS, Concept, fetch, load_concepts, make_emoji
from mars.data.shards import Picture
from mars.errors import DataError
from mars.evaluation import questions

CIRCLE = '<circle cx="8" cy="8" r="8" fill="red"/>'
NO_NAMES = {"en": frozenset[str](), "zh": frozenset[str]()}
ENTRIES: list[dict[str, Any]] = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit", "red apple", "Red Apple"], "group": 4},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
    {"hexcode": "1F46A", "label": "Rock & roll’s", "group": 1},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F1E6", "label": "letter", "tags": []},
    {"hexcode": "1F355", "label": "only in English", "group": 4},
]


def package(cache: Path, name: str, version: str, files: dict[str, Any]) -> None:
    folder = cache / f"{name.replace('/', '-').lstrip('@')}-{version}" / "package"
    for path, table in ({"package.json": {}} | files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(table), "utf-8")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """What npm would bring, made by hand: three emoji, of which two sets draw some."""
    chinese = [entry | {"label": f"中{index}"} for index, entry in enumerate(ENTRIES[:-1])]
    package(tmp_path, *CLDR, {"en/data.json": ENTRIES, "zh/data.json": chinese})
    square = '<path d="M0 0h16v8H0z" fill="#00f"/>'
    noto = {"icons": {"apple": {"body": CIRCLE}, "heart": {"body": square, "height": 8}}, "width": 16, "height": 16}
    noto["aliases"] = {"old-apple": {"parent": "apple"}, "turned": {"parent": "apple", "rotate": 1}}
    characters = {"1f34e": "old-apple", "2764": "heart", "1f46a": "turned"}
    package(tmp_path, SETS["noto"].package, SETS["noto"].version, {"icons.json": noto, "chars.json": characters})
    by_name = {"icons": {"redapple": {"body": CIRCLE}, "rock-and-rolls": {"body": CIRCLE}}}
    package(tmp_path, SETS["fluent"].package, SETS["fluent"].version, {"icons.json": by_name, "chars.json": {}})
    return tmp_path


def pictures(cache: Path, **options: Any) -> dict[str, Picture]:
    return {one.record.key: one for one in make_emoji(cache=cache, size=32, **options)}


def test_concepts_are_pictures_with_both_languages(cache: Path) -> None:
    concepts = load_concepts(cache)
    assert [concept.hexcode for concept in concepts] == ["1F34E", "2764-FE0F", "1F46A"]
    assert concepts[0].names == {"en": "red apple", "zh": "中0"}
    assert concepts[2].tags == {"en": (), "zh": ()}


def test_artwork_is_found_by_character_by_alias_and_by_name(cache: Path) -> None:
    found = pictures(cache, styles=("noto", "fluent"))
    assert found.keys() == {"noto-1f34e", "noto-2764-fe0f", "fluent-1f34e", "fluent-1f46a"}
    record = found["noto-1f34e"].record
    assert (record.source, record.licence, record.style) == ("Noto Emoji, Google", "Apache-2.0", "noto")


def test_artwork_is_centred_on_white_with_a_margin(cache: Path) -> None:
    found = pictures(cache, styles=("noto",))
    for key, colour, box in (
        ("noto-1f34e", (255, 0, 0), (1, 1, 31, 31)),
        ("noto-2764-fe0f", (0, 0, 255), (1, 9, 31, 23)),
    ):
        with Image.open(io.BytesIO(found[key].content)) as image:
            pixels = image.convert("RGB")
        assert pixels.size == (32, 32)
        assert pixels.getpixel((0, 0)) == (255, 255, 255)
        assert pixels.getpixel((16, 16)) == colour
        red, _, blue = pixels.split()
        inked = (blue if colour[0] else red).point(lambda value: 255 if value < 128 else 0).getbbox()
        assert inked is not None
        assert all(abs(one - other) <= 1 for one, other in zip(inked, box, strict=True))


def test_the_same_set_is_made_twice(cache: Path) -> None:
    assert pictures(cache, styles=("noto",)) == pictures(cache, styles=("noto",))


PANIC = (
    '<filter id="f" filterUnits="userSpaceOnUse" width="22.5" height="17.813" x="2.5" y="10.188">'
    '<feGaussianBlur stdDeviation="1"/><feComposite in2="SourceAlpha" k2="-1" k3="1" operator="arithmetic"/></filter>'
    '<rect width="22" height="17" x="3" y="10.6" filter="url(#f)"/>'
)
"""On which resvg 0.48 panics: the two pictures of the filter differ by a row."""


def test_an_icon_that_the_renderer_cannot_draw_is_told_in_one_line_and_left_out(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    icons = cache / "iconify-json-noto-1.2.9" / "package" / "icons.json"
    table = json.loads(icons.read_text())
    table["icons"]["heart"] = {"body": PANIC, "width": 32, "height": 32}
    icons.write_text(json.dumps(table))
    refused: dict[str, str] = {}
    assert pictures(cache, styles=("noto",), refused=refused.__setitem__).keys() == {"noto-1f34e"}
    assert refused.keys() == {"noto-2764-fe0f"}
    assert refused["noto-2764-fe0f"].startswith("the renderer panics: index out of bounds")
    assert "\n" not in refused["noto-2764-fe0f"]
    assert capfd.readouterr() == ("", "")


def test_other_faults_of_the_renderer_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import resvg_py

    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        emoji._render(CIRCLE, 16)


def concept(index: int) -> Concept:
    tags = tuple(f"tag {index} {number}" for number in range(6))
    return Concept(
        hexcode=f"{index:X}", names={"en": f"name {index}", "zh": f"名 {index}"}, tags={"en": tags, "zh": tags}
    )


def test_captions_name_style_and_tag_in_both_languages_and_hide_some_tags() -> None:
    hidden = 0
    for index in range(200):
        captions = emoji._captions(concept(index), SETS["noto"], NO_NAMES)
        texts = {(one.language, one.kind): one.text for one in reversed(captions)}
        assert len({(one.language, one.kind, one.text) for one in captions}) == len(captions)
        assert texts["en", "name"] == f"name {index}"
        assert texts["zh", "style"] == f"名 {index}，Noto 风格"
        known = set(texts.get(("en", "tags"), "").split(", ")) - {""}
        secret = set(texts.get(("en", "paraphrase"), "").split(", ")) - {""}
        assert not known & secret
        tagged = [one.text.split(", ") for one in captions if (one.language, one.kind) == ("en", "tags")]
        assert all(0 < len(some) <= 4 and not set(some) & secret for some in tagged)
        asked = [one.text for one in captions if (one.language, one.kind) == ("en", "request")]
        assert len(asked) == emoji.REQUESTS_EACH
        assert all(f"name {index}" in text and text != f"name {index}" for text in asked)
        assert captions == emoji._captions(concept(index), SETS["noto"], NO_NAMES)
        other = {
            (one.language, one.kind): one.text for one in emoji._captions(concept(index), SETS["fluent"], NO_NAMES)
        }
        assert other.get(("en", "paraphrase")) == texts.get(("en", "paraphrase"))
        hidden += len(secret)
    assert 0.3 < hidden / 1200 < 0.5


def test_evaluation_asks_in_words_that_no_request_has() -> None:
    for chosen in questions.SETS.values():
        for language, wording in (chosen.wording or {}).items():
            assert wording not in REQUESTS[language]


def test_the_name_of_another_picture_is_no_caption_of_this_one() -> None:
    seen: set[str] = set()
    for index in range(200):
        names = NO_NAMES | {"en": frozenset(f"tag {index} {number}" for number in "01")}
        captions = emoji._captions(concept(index), SETS["noto"], names)
        tagged = [one.text for one in captions if (one.language, one.kind) == ("en", "tags")]
        assert not {f"tag {index} 0", f"tag {index} 1"} & set(tagged)
        seen |= {text.removeprefix(f"tag {index} ") for text in tagged if "," not in text}
    assert seen == set("2345")


def test_a_tag_that_is_the_name_is_no_caption(cache: Path) -> None:
    apple = load_concepts(cache)[0]
    tagged = [one.text for one in emoji._captions(apple, SETS["noto"], NO_NAMES) if one.kind in ("tags", "paraphrase")]
    assert tagged[0] == "fruit"


def test_of_few_concepts_each_count_holds_the_smaller_ones(cache: Path) -> None:
    found = [{one.record.concept for one in make_emoji(cache=cache, size=32, count=count)} for count in (1, 2, 3, 99)]
    assert list(map(len, found)) == [1, 2, 3, 3]
    assert found[0] < found[1] < found[2] == found[3]


def test_a_concept_is_held_out_in_every_style_and_a_picture_in_one() -> None:
    splits = {(index, style): emoji._split(concept(index), style) for index in range(2000) for style in SETS}
    counts = Counter(splits.values())
    assert counts.keys() == {"train", "concept", "picture"}
    assert 0.025 < counts["concept"] / len(splits) < 0.055
    assert 0.025 < counts["picture"] / len(splits) < 0.055
    for index in range(2000):
        found = {splits[index, style] for style in SETS}
        assert found == {"concept"} or "concept" not in found


def test_only_licences_that_allow_it_are_taken() -> None:
    assert {one.licence for one in SETS.values()} <= {"Apache-2.0", "MIT", "CC-BY-4.0"}


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program called npm first on the path."""
    program = folder / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def archive(path: Path, *, cut: int = 0) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("package/package.json", b"{}"), ("package/icons.json", bytes(range(256)) * 400)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])


@pytest.mark.parametrize("filters", [True, False], ids=["", "Python 3.11.3"])
def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, filters: bool) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive(tmp_path / "a.tgz")
    script = f'echo "$@" >> {tmp_path}/calls; eval "folder=\\${{$#}}"; cp {tmp_path}/a.tgz "$folder/"'
    npm(tmp_path, script, monkeypatch)
    for _ in range(2):
        folder = fetch("@scope/name", "1.2.3", tmp_path / "cache")
    assert folder == tmp_path / "cache" / "scope-name-1.2.3" / "package"
    assert len((folder / "icons.json").read_bytes()) == 256 * 400
    (call,) = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert "@scope/name@1.2.3" in call.split()


def test_no_npm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="`npm` was not found; install Node.js"):
        fetch("a", "1.0.0", tmp_path)


def test_what_npm_complains_of_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path, "echo 'npm ERR! 404' >&2; echo 'not here' >&2; exit 1", monkeypatch)
    with pytest.raises(DataError, match=r"npm could not fetch a@1\.0\.0: npm ERR! 404 not here") as caught:
        fetch("a", "1.0.0", tmp_path)
    assert "\n" not in str(caught.value)


def test_half_a_package_is_one_line_and_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "a.tgz", cut=60)
    npm(tmp_path, f'eval "folder=\\${{$#}}"; cp {tmp_path}/a.tgz "$folder/"', monkeypatch)
    with pytest.raises(DataError):
        fetch("a", "1.0.0", tmp_path / "cache")
    archive(tmp_path / "a.tgz")
    assert len((fetch("a", "1.0.0", tmp_path / "cache") / "icons.json").read_bytes()) == 256 * 400
