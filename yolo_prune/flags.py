"""Settings from `--flag value` words, the habit of YOLOv5's users, into the same typed dataclasses as `key=value`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from yolo_prune.configuration import describe, parse

Schema = TypeVar("Schema")


def add_flags(parser: argparse.ArgumentParser, schema: Any, names: Mapping[str, str]) -> None:
    """Give a parser one flag for each setting of a schema, with dashes.

    Args:
        parser: The parser.
        schema: Dataclass that describes the settings.
        names: Flags that are not called like their setting.
    """
    for name, default, text in describe(schema):
        flag = names.get(name, f"--{name.replace('_', '-')}")
        kind: dict[str, Any] = {"action": "store_true"} if default == "false" else {"required": default == "required"}
        note = default if default == "required" else f"default: {default}"
        parser.add_argument(flag, dest=name, default=None, help=f"{text} ({note})", **kind)


def settings_of(schema: type[Schema], opt: argparse.Namespace) -> Schema:
    """Return the settings that parsed flags give.

    Raises:
        ConfigError: A value of a wrong type.
    """
    names = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    return parse(schema, [f"{name}={getattr(opt, name)}" for name in names if getattr(opt, name) is not None])[0]


def parse_flags(
    schema: type[Schema], words: Sequence[str], *, program: str, summary: str, names: Mapping[str, str] | None = None
) -> tuple[Schema, list[str]]:
    """Read the flags of a schema; what it does not know is handed back untouched, in its order.

    Args:
        schema: Dataclass that describes the settings.
        words: The words.
        program: What `--help` calls the command.
        summary: First line of `--help`.
        names: Flags that are not called like their setting.

    Raises:
        ConfigError: A value of a wrong type.
    """
    parser = argparse.ArgumentParser(prog=program, description=summary, allow_abbrev=False)
    add_flags(parser, schema, names or {})
    opt, rest = parser.parse_known_args(words)
    return settings_of(schema, opt), rest
