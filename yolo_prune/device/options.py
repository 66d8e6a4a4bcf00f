"""`key=value` words of the runner, as the project's own command line has them, read with nothing but Python."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Sequence, TypeVar

from yolo_prune.errors import ConfigError

Schema = TypeVar("Schema")

_TRUTH = {"true": True, "false": False}


def option(default: Any, help: str, *, required: bool = False) -> Any:  # noqa: A002  # the field's word
    """Declare a field of a schema.

    Args:
        default: Its default, whose type the value gets.
        help: One line for `--help`.
        required: Whether it must be given; the default then is only an example of the type.
    """
    return dataclasses.field(default=default, metadata={"help": help, "required": required})


def read_options(schema: type[Schema], words: Sequence[str]) -> Schema:
    """Read words into a schema.

    Raises:
        ConfigError: Not key=value, an unknown or repeated key, a value of a wrong type, or a required key is missing.
    """
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"argument '{word}'", expected="key=value, such as conf=0.25")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            known = f"'{near[0]}'?" if near else f"one of: {', '.join(fields)}"
            raise ConfigError(f"unknown key '{key}'", expected=known, remedy="see --help for every key")
        if key in values:
            raise ConfigError(f"'{key}' is given twice", expected="each key once")
        values[key] = _typed(key, value, type(fields[key].default))
    for name, field in fields.items():
        if field.metadata["required"] and name not in values:
            raise ConfigError(f"'{name}=' is required", expected=f"{name}: {field.metadata['help']}")
    return schema(**values)


def describe_options(schema: Any) -> list[str]:
    """Return a line for every key, with its default and its help."""
    rows = [
        (field.name, "required" if field.metadata["required"] else _shown(field.default), field.metadata["help"])
        for field in dataclasses.fields(schema)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {name:<{widths[0]}}  {default:<{widths[1]}}  {text}" for name, default, text in rows]


def _typed(key: str, value: str, kind: Any) -> Any:
    """Return a value as the type of its default."""
    try:
        return _TRUTH[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{key}={value}", expected=expected) from None


def _shown(default: Any) -> str:
    """Return a default as one would type it."""
    if isinstance(default, bool):
        return str(default).lower()
    return "not set" if default == "" else str(default)
