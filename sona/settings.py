"""Nested tables to frozen dataclasses, by their type hints. Knows no setting of ours.

A path is the dotted name of a setting: `engine.max_num_seqs`. In the environment it is
`SONA_ENGINE_MAX_NUM_SEQS`. Lists of tables (`auth.key`) exist in files and flags only.
"""

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.errors import ConfigError

_T = TypeVar("_T")
_PREFIX = "SONA_"
# Read by the commands themselves; not settings.
_OTHER_NAMES = frozenset({"SONA_CONFIG", "SONA_ADDRESS", "SONA_API_KEY"})
# Kubernetes adds these to every pod beside a service of the name "sona" or "sona-…".
_SERVICE_LINK = re.compile(r"SONA_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def build(kind: type[_T], table: Mapping[str, Any], *, prefix: str = "") -> _T:
    """Make a dataclass from a table. Raises ConfigError for unknown keys and wrong types."""
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise ConfigError(f"unknown setting {prefix}{key}; {_suggest(key, list(hints))}")
    for name in _required(kind):
        if name not in table:
            raise ConfigError(f"{prefix.rstrip('.')} needs {name}; it has {', '.join(table)}")
    return kind(**{key: _value(hints[key], item, f"{prefix}{key}") for key, item in table.items()})


def leaves(kind: type, *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting below a dataclass: path and type hint."""
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from leaves(hint, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def values(config: object, *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's value below a dataclass instance."""
    assert is_dataclass(config)
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from values(value, prefix=f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value


def paths(table: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """The paths that a nested table sets."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from paths(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def put(tree: dict[str, Any], path: str, value: object) -> None:
    """Set a path in a nested table. A list of tables grows; everything else is replaced."""
    *sections, name = path.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{section} is {below!r}; it is a section with settings of its own")
        tree = below
    if isinstance(value, list) and isinstance(tree.get(name), list):
        tree[name] = [*tree[name], *value]
    else:
        tree[name] = value


def variable(path: str) -> str:
    """The environment variable of a setting."""
    return _PREFIX + path.replace(".", "_").upper()


def from_environ(kind: type, environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """The settings that the environment makes: path to value and variable.

    Raises ConfigError for an unknown SONA_ variable, and for a value that cannot be read.
    """
    known = {
        variable(path): (path, hint) for path, hint in leaves(kind) if get_origin(hint) is not tuple
    }
    found: dict[str, tuple[Any, str]] = {}
    for name, text in environ.items():
        if not name.startswith(_PREFIX) or name in _OTHER_NAMES:
            continue
        if name in known:
            path, hint = known[name]
            found[path] = (_from_text(hint, text, name), name)
        elif not _SERVICE_LINK.fullmatch(name):
            raise ConfigError(
                f"unknown environment variable {name}; {_suggest(name, [*known, *_OTHER_NAMES])}"
            )
    return found


def _required(kind: Any) -> list[str]:
    """Fields without a default."""
    return [
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    ]


def _from_text(hint: Any, text: str, name: str) -> Any:
    try:
        if hint is bool:
            return _WORDS[text.strip().lower()]
        if hint in (int, float):
            return hint(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name} is {text!r}; use {_NAMES[hint]}") from None
    return text


def _value(want: Any, value: Any, path: str) -> Any:
    if isinstance(want, type) and is_dataclass(want):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; it is a section with settings of its own")
        return build(want, value, prefix=f"{path}.")
    origin = get_origin(want)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path} is {value!r}; write it as [[{path}]] tables")
        item = get_args(want)[0]
        return tuple(_value(item, each, path) for each in value)
    if origin is Literal:
        if value not in get_args(want):
            allowed = ", ".join(repr(each) for each in get_args(want))
            raise ConfigError(f"{path} is {value!r}; use one of {allowed}")
        return value
    assert origin not in (Union, types.UnionType), f"{path}: give it one type"
    if want is Path and isinstance(value, str):
        return Path(value)
    if want is float and type(value) is int:
        return float(value)
    if type(value) is not want and not (want is Path and isinstance(value, Path)):
        raise ConfigError(f"{path} is {value!r}; use {_NAMES[want]}")
    return value


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(known)}"
