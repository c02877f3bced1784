"""Strict reading of config dataclasses: unknown keys, wrong types and values out of range are refused by key path.

Works on any tree of dataclasses whose leaves are bool, int, float, str, Literal, ``X | None``, ``tuple[X, ...]`` or
``dict[str, X]``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from hiexp._extras import require
from hiexp.io import DataError

T = TypeVar("T")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def setting(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Any:
    """A dataclass field with a default and the range its number must lie in (None values are not checked)."""
    return dataclasses.field(default=default, metadata={"at_least": at_least, "above": above, "at_most": at_most})


def check_ranges(config: Any, path: str = "") -> None:
    """Raise ValueError for the first number outside the range its field declares."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
            continue
        if value is None or not field.metadata:
            continue
        at_least, above, at_most = (field.metadata[name] for name in ("at_least", "above", "at_most"))
        # Negated comparisons, so that NaN is refused as well.
        if at_least is not None and not value >= at_least:
            raise ValueError(f"{key}: expected a number >= {at_least:g}, got {value!r}")
        if above is not None and not value > above:
            raise ValueError(f"{key}: expected a number > {above:g}, got {value!r}")
        if at_most is not None and not value <= at_most:
            raise ValueError(f"{key}: expected a number <= {at_most:g}, got {value!r}")


def build(cls: type[T], values: Any, source: str, path: str = "") -> T:
    """Build dataclass ``cls`` from nested dicts; ``source`` and the key path start every error message."""
    where = f"{source}: {path.rstrip('.')}" if path else source
    if not isinstance(values, dict):
        raise TypeError(f"{where}: expected a mapping, got {type(values).__name__} {values!r}")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {path}{near[0]!s}?" if near else f"; known keys: {', '.join(hints)}"
            raise ValueError(f"{source}: unknown key {path}{key}{hint}")
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = build(typing.cast(type, hints[key]), value, source, f"{path}{key}.")
        else:
            arguments[key] = _convert(value, hints[key], f"{source}: {path}{key}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for; only int -> float and list -> tuple are converted."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(arm for arm in get_args(hint) if arm is not type(None)), where)
    if origin is Literal:
        if value in get_args(hint):
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(hint)], n=1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, get_args(hint)))}; got {value!r}{hint_text}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where}: expected a list, got {type(value).__name__} {value!r}")
        return tuple(_convert(item, get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where}: expected a mapping, got {type(value).__name__} {value!r}")
        return {str(key): _convert(item, get_args(hint)[1], f"{where}.{key}") for key, item in value.items()}
    # bool is an int in Python; a config that says true where a number belongs is a mistake.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{where}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    return _expand(value, where) if isinstance(value, str) else value


def _expand(text: str, where: str) -> str:
    """Replace ``${NAME}`` and ``${NAME:-default}`` by environment variables."""

    def substitute(match: re.Match[str]) -> str:
        value = os.environ.get(match[1], match[2])
        if value is None:
            raise ValueError(f"{where}: environment variable {match[1]} is not set and {text!r} gives no default")
        return value

    return _VARIABLE.sub(substitute, text)


def to_plain(config: Any) -> dict[str, Any]:
    """Nested dicts with lists in place of tuples: what YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_plain(value)
        return list(value) if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def read_yaml(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file with ``stage.key=value`` overrides applied (values are parsed as YAML)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 (byte {error.start})") from error
    values = _parse(text, str(path))
    if values is None:
        raise DataError(f"{path}: empty file, expected a YAML mapping")
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return override_keys(values, overrides)


def override_keys(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``values`` with ``stage.key=value`` overrides applied in place (values are parsed as YAML)."""
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set: expected stage.key=value, got {override!r}")
        target = values
        *stages, name = key.strip().split(".")
        for stage in stages:
            target = target.setdefault(stage, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {stage} is no mapping")
        target[name] = _parse(raw, f"--set {override}")
    return values


def _parse(text: str, source: str) -> Any:
    yaml = require("yaml", "train", "reading a training config")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise DataError(f"{source}:{node.value[i][0].start_mark.line + 1}: key {key!r} appears twice")
            return dict(super().construct_mapping(node, deep=deep))

    # PyYAML follows YAML 1.1, where 1e-6 (no dot) is a string; people write learning rates that way.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise DataError(f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def dump_yaml(config: Any) -> str:
    """The resolved config as YAML text."""
    yaml = require("yaml", "train", "writing the resolved config")
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def changed_settings(stored: dict[str, Any], config: Any) -> list[str]:
    """Lines ``key: old -> new`` for every setting of ``config`` that differs from the ``stored`` ones.

    A setting that is not stored did not exist then and counts as the default of its dataclass, which keeps what was
    done before there was a choice. A dataclass with a method ``means`` says what other words mean the same.
    """
    return differing_keys(_in_words_of(config, stored), to_plain(config), _defaults(config))


def _in_words_of(config: Any, stored: dict[str, Any]) -> dict[str, Any]:
    stages = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    inner = {
        name: _in_words_of(value, stored[name])
        for name, value in stages.items()
        if dataclasses.is_dataclass(value) and isinstance(stored.get(name), dict)
    }
    return config.means(stored | inner) if hasattr(config, "means") else stored | inner


def _defaults(config: Any) -> dict[str, Any]:
    # Every stage's own: what a quickstart presets in a stage it may have preset since.
    stages = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    inner = {name: _defaults(value) for name, value in stages.items() if dataclasses.is_dataclass(value)}
    return to_plain(type(config)()) | inner


def differing_keys(old: dict[str, Any], new: dict[str, Any], absent: dict[str, Any], path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf that differs between nested dicts; ``absent``: what ``old`` lacks."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, absent.get(key)), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, absent.get(key, {}), f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: {before!r} -> {after!r}")
    return lines


def describe(cls: type, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield ``(key path, default, sentence)`` of every leaf, in the order of the source."""
    hints, sentences, default = typing.get_type_hints(cls), _field_sentences(cls), cls()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from describe(hints[field.name], f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", repr(getattr(default, field.name)), sentences.get(field.name, "")


def _field_sentences(cls: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the source of ``cls``."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    sentences = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            sentences[typing.cast(ast.Name, field.target).id] = " ".join(str(after.value.value).split())
    return sentences
