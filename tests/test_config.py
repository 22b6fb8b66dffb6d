import math
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars.config import find_callable, from_dict, from_overrides, load_config, to_dict
from mars.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rates:
    learning_rate: float = 3e-4
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be greater than 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    name: str = "run"
    kind: Literal["draw", "read"] = "draw"
    fast: bool = False
    data: Path | None = None
    layers: tuple[int, ...] | None = None
    limit: int | str = 5
    weights: dict[str, float] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)


WHOLE = """
steps = 7
name = "bloom"
kind = "read"
fast = true
data = "a/b"
layers = [1, 2]
limit = "none"
weights = { emoji = 1, scenes = 0.5 }
[rates]
learning_rate = 1
betas = [0.5, 0.75]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_becomes_a_config(tmp_path: Path) -> None:
    config = load_config(Run, write(tmp_path, WHOLE))
    assert config == Run(
        steps=7,
        name="bloom",
        kind="read",
        fast=True,
        data=Path("a/b"),
        layers=(1, 2),
        limit="none",
        weights={"emoji": 1.0, "scenes": 0.5},
        rates=Rates(learning_rate=1.0, betas=(0.5, 0.75)),
    )
    assert isinstance(config.rates.learning_rate, float)


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "steps = 7")) == Run(steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 7", "unknown key step; did you mean steps?"),
        ("steps = 7\n[rates]\nlearning_rat = 1.0", "unknown key rates.learning_rat; did you mean rates.learning_rate?"),
        ("steps = 7\n[rates]\nzzz = 1", "unknown key rates.zzz; known keys are learning_rate, warmup, betas"),
        ("name = 'a'", "steps is required (int), but it is missing"),
        ("steps = 'many'", "steps must be int, got 'many'"),
        ("steps = 1.5", "steps must be int, got 1.5"),
        ("steps = true", "steps must be int, got True"),
        ("steps = 7\nfast = 1", "fast must be bool, got 1"),
        ("steps = 7\nname = 3", "name must be str, got 3"),
        ("steps = 7\nkind = 'paint'", "kind must be typing.Literal['draw', 'read'], got 'paint'"),
        ("steps = 7\nlimit = 1.5", "limit must be int or str, got 1.5"),
        ("steps = 7\nlayers = [1, 'two']", "layers[1] must be int, got 'two'"),
        ("steps = 7\nlayers = 1", "layers must be tuple[int, ...], got 1"),
        ("steps = 7\nrates = 3", "rates must be a table, got 3"),
        ("steps = 7\n[rates]\nlearning_rate = true", "rates.learning_rate must be float, got True"),
        ("steps = 7\n[rates]\nbetas = [0.9]", "rates.betas must have 2 values, got [0.9]"),
        ("steps = 7\n[rates]\nlearning_rate = -1.0", "learning_rate must be greater than 0, got -1.0"),
        ("steps = 7\n[rates]\nlearning_rate = nan", "rates.learning_rate must be float, got nan"),
        ("steps = 7\n[weights]\nemoji = 'much'", "weights.emoji must be float, got 'much'"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, text))
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_null_can_be_set(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cut:
        layers: int | None = 3
        name: str = "a"

    assert load_config(Cut, write(tmp_path, "layers = 2"), ["layers=null"]) == Cut(layers=None)
    assert load_config(Cut, write(tmp_path, ""), ['name="null"']) == Cut(name="null")


def test_a_missing_file_says_where_examples_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*none.toml; see configs/ for examples"):
        load_config(Run, tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe", b"PK\x03\x04"])
def test_a_file_that_is_no_toml_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a TOML file") as caught:
        load_config(Run, path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a TOML file"):
        load_config(Run, tmp_path)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("steps=9", Run(steps=9)),
        ("rates.learning_rate=1e-3", Run(steps=7, rates=Rates(learning_rate=1e-3))),
        ("rates.learning_rate = 1", Run(steps=7, rates=Rates(learning_rate=1.0))),
        ("name=a bare word", Run(steps=7, name="a bare word")),
        ("name=x=y", Run(steps=7, name="x=y")),
        ("name='3'", Run(steps=7, name="3")),
        ("fast=true", Run(steps=7, fast=True)),
        ("layers=[0, 2]", Run(steps=7, layers=(0, 2))),
        ("data=some/where", Run(steps=7, data=Path("some/where"))),
        ("weights.emoji=2", Run(steps=7, weights={"emoji": 2.0})),
    ],
)
def test_an_override_replaces_one_value(tmp_path: Path, override: str, wanted: Run) -> None:
    assert load_config(Run, write(tmp_path, "steps = 7"), [override]) == wanted


def test_the_last_override_counts(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "steps = 7"), ["steps=8", "steps=9"]).steps == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "an override must look like section.key=value, got 'steps'"),
        ("=3", "an override must look like section.key=value"),
        ("rates.=3", "an override must look like section.key=value"),
        ("steps.deep=3", "steps.deep cannot be set: steps is not a table"),
        ("rates.learning=3", "unknown key rates.learning; did you mean rates.learning_rate?"),
        ("steps=many", "steps must be int, got 'many'"),
    ],
)
def test_a_bad_override_is_one_clear_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, "steps = 7"), [override])
    assert str(caught.value).startswith(message)


runs = st.builds(
    Run,
    steps=st.integers(),
    name=st.text(),
    kind=st.sampled_from(["draw", "read"]),
    fast=st.booleans(),
    data=st.none() | st.sampled_from([Path("a"), Path("b/c"), Path("/")]),
    layers=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    limit=st.integers() | st.text(),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    rates=st.builds(Rates, learning_rate=st.floats(min_value=0, exclude_min=True), warmup=st.integers()),
)


def test_overrides_alone_make_a_config() -> None:
    assert from_overrides(Run, ["steps=9", "rates.learning_rate=1e-3", "steps=8"]) == Run(
        steps=8, rates=Rates(learning_rate=1e-3)
    )
    with pytest.raises(ConfigError, match=r"^steps is required \(int\), but it is missing$"):
        from_overrides(Run, [])
    with pytest.raises(ConfigError, match=r"^unknown key step; did you mean steps\?$"):
        from_overrides(Run, ["step=9"])


@given(runs)
def test_a_config_survives_tables(config: Run) -> None:
    assert from_dict(Run, to_dict(config)) == config


@given(
    st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text() | st.lists(st.integers()), max_size=4)
)
def test_a_random_table_gives_a_config_or_a_config_error(table: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert isinstance(from_dict(Run, table), Run)


def test_an_integer_beyond_floats_is_one_line() -> None:
    with pytest.raises(ConfigError, match="learning_rate must be float"):
        from_dict(Rates, {"learning_rate": 10**400})


def test_infinity_is_a_number(tmp_path: Path) -> None:
    assert math.isinf(load_config(Run, write(tmp_path, "steps = 7\nrates.learning_rate = inf")).rates.learning_rate)


def test_a_callable_is_found_by_its_name_in_the_working_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "module_of_a_test.py").write_text("def look():\n    return 7\n", "utf-8")
    (tmp_path / "broken_module_of_a_test.py").write_text("raise RuntimeError('no\\nkey')\n", "utf-8")
    assert find_callable("module_of_a_test:look", what="x must be")() == 7
    assert find_callable("json:dumps", what="x must be")(1) == "1"
    for path in ("nothing", "no.such.module:look", "json:nothing", "json:__name__", ":x", "broken_module_of_a_test:x"):
        with pytest.raises(ConfigError, match=f"x must be package.module:name of a callable, got {path}") as caught:
            find_callable(path, what="x must be")
        assert "\n" not in str(caught.value)
