import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mars.config import from_dict, from_overrides, load_config, to_dict
from mars.data.curation.config import CurationConfig
from mars.errors import ConfigError


def test_the_defaults_are_a_configuration() -> None:
    assert from_overrides(CurationConfig, ()) == CurationConfig()
    assert from_dict(CurationConfig, to_dict(CurationConfig())) == CurationConfig()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"size": {"least_side": 0}}, "at least 1"),
        ({"size": {"most_aspect": 0.5}}, "the longer side over the shorter"),
        ({"size": {"least": 3}}, "did you mean size.least_side"),
        ({"captions": {"languages": []}}, "at least one language"),
        ({"captions": {"length": {"en": [5, 2]}}}, "captions.length.en"),
        ({"captions": {"mislabelled": "keep"}}, "captions.mislabelled"),
        ({"captions": {"required": -1}}, "captions.required"),
        ({"duplicates": {"distance": 12}}, "duplicates.distance"),
        ({"duplicates": {"colour": 256}}, "duplicates.colour"),
        ({"scorers": [{"scorer": "Sharpness"}]}, "module:Class"),
        ({"scorers": [{"scorer": "a:B", "least": 2, "most": 1}]}, "above most"),
        ({"scorers": [{"least": 2}]}, "scorer is required"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        from_dict(CurationConfig, table)
    assert "\n" not in str(caught.value)


def test_the_shipped_configuration_is_right_with_its_commented_scorers_too() -> None:
    path = Path(__file__).parents[3] / "configs" / "data" / "curate.toml"
    config = load_config(CurationConfig, path)
    assert config.size.least_side == 512
    text = re.sub(r"^#   ", "", path.read_text("utf-8").partition("# With a CLIP")[2], flags=re.MULTILINE)
    scorers = tomllib.loads("".join(line for line in text.splitlines(keepends=True) if re.match(r"\[|\w+ = ", line)))
    found = from_dict(CurationConfig, scorers).scorers
    assert [one.scorer.partition(":")[2] for one in found] == ["ClipScore", "ClipAesthetic"]
