"""TOML files to frozen dataclasses and back, strictly: an unknown key, wrong type or bad value is one clear line."""

import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mars.errors import ConfigError

T = TypeVar("T")


def load_config(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Reads a TOML file into `cls`, after `section.key=value` overrides.

    Raises:
        ConfigError: if the file is missing or no TOML, or a key, type or value is wrong.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; see configs/ for examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    for override in overrides:
        _set(table, override)
    return from_dict(cls, table)


def from_overrides(cls: type[T], overrides: Sequence[str]) -> T:
    """`cls` with its defaults, but for `key=value` overrides.

    Raises:
        ConfigError: if a key, type or value is wrong, or a value without a default is missing.
    """
    table: dict[str, Any] = {}
    for override in overrides:
        _set(table, override)
    return from_dict(cls, table)


def from_dict(cls: type[T], table: Mapping[str, Any], *, where: str = "") -> T:
    """Builds a dataclass from nested tables.

    Raises:
        ConfigError: with the full name of the key that is unknown, missing or of the wrong type.
    """
    assert dataclasses.is_dataclass(cls)
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        name = f"{where}{key}"
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"known keys are {', '.join(fields)}"
            raise ConfigError(f"unknown key {name}; {hint}")
        values[key] = _convert(hints[key], value, name)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise ConfigError(f"{where}{key} is required ({_name(hints[key])}), but it is missing")
    built: T = cls(**values)
    return built


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready tables; `from_dict` is its inverse."""
    table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return table


def _set(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"an override must look like section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip() == "null" else text.strip()  # a bare word is a string
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name} cannot be set: {key} is not a table")
    table[keys[-1]] = value


def _name(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in get_args(kind))
    if kind is types.NoneType:
        return "null"
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        options = [option for option in arguments if option is not types.NoneType]
        return _convert(options[0], value, name) if len(options) == 1 else _first_fit(options, value, name)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return from_dict(kind, value, where=f"{name}.")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ConfigError(f"{name} must have {len(arguments)} values, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and _is_float(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ConfigError(f"{name} must be {_name(kind)}, got {value!r}")


def _is_float(value: Any) -> bool:
    """Not so NaN, which every comparison would let pass, nor integers that are too large."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


def _first_fit(options: Sequence[Any], value: Any, name: str) -> Any:
    for option in options:
        try:
            return _convert(option, value, name)
        except ConfigError:
            continue
    raise ConfigError(f"{name} must be {' or '.join(_name(option) for option in options)}, got {value!r}")


def find_callable(path: str, *, what: str) -> Callable[..., Any]:
    """The callable at `package.module:name`, of a package that is installed or lies in the working directory.

    Args:
        what: begins the message of an error, such as `moderation must be`.

    Raises:
        ConfigError: if there is none.
    """
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever a module does when it is imported
        said = " ".join(str(error).split())
        raise ConfigError(f"{what} package.module:name of a callable, got {path} ({said:.200})") from error
    if not callable(found):
        raise ConfigError(f"{what} package.module:name of a callable, got {path}, which cannot be called")
    return cast(Callable[..., Any], found)
