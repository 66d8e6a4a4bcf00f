"""Settings from `key=value` words and YAML files into typed dataclasses.

The schema of a command is a dataclass; OmegaConf checks types. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from yolo_prune.errors import ConfigError

Schema = TypeVar("Schema")

_LISTS, _MAPPINGS = (list, ListConfig), (dict, DictConfig)
_CONTAINERS = (*_LISTS, *_MAPPINGS)


def setting(default: Any = MISSING, *, help: str, unit: str = "") -> Any:  # noqa: A002  # the field's word
    """Declare a field of a schema.

    Args:
        default: Its default; without one the field is required.
        help: One line for `--help`.
        unit: Unit of the value, if it has one.
    """
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def json_setting(what: str) -> Any:
    """Declare the `json=` that every command has: a file for what it prints."""
    return setting(None, help=f"also write {what} to this JSON file; must not exist")


def parse(
    schema: type[Schema], words: Sequence[str], *, passed_on: Iterable[str] = ()
) -> tuple[Schema, dict[str, Any]]:
    """Read `key=value` words.

    Args:
        schema: Dataclass that describes the settings.
        words: The words; values are read as YAML.
        passed_on: Further keys that are allowed and handed back untouched (the host's own).

    Returns:
        The settings, and what is passed on.

    Raises:
        ConfigError: Not key=value, an unknown key, a value of a wrong type, or a required key that is missing.
    """
    values = _split_all(words)
    own = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    others = {
        key: values.pop(key) for key in list(values) if key.partition(".")[0] not in own and key in set(passed_on)
    }
    require_known(values, {*own, *passed_on})
    passed: Any = OmegaConf.to_container(_nested(others))
    return structured(schema, _nested(values)), passed


def load(schema: type[Schema], path: Path, words: Sequence[str]) -> Schema:
    """Read a YAML file and lay `key=value` words (dots reach inside) over it.

    Raises:
        ConfigError: As in `parse`, or the file cannot be read.
    """
    try:
        content = OmegaConf.load(path)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read '{path}': {error}", expected="a YAML file of settings") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"'{path}' holds a list", expected="a YAML mapping of settings")
    values = _split_all(words)
    own = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    require_known([*content, *values], own)
    return structured(schema, content, _nested(values))


def read_mapping(path: Path, *, what: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.
        what: What the mapping should hold, for the message.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read '{path}': {error}", expected=f"a YAML mapping of {what}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"'{path}' holds {type(content).__name__}", expected=f"a YAML mapping of {what}")
    return {str(key): value for key, value in content.items()}


def structured(schema: type[Schema], *values: Any) -> Schema:
    """Check values, of which later ones override earlier ones, against a schema and return an instance of it.

    Raises:
        ConfigError: A value of a wrong type, or a required key that is missing.
    """
    try:
        for several in values:
            _require_kinds(schema, several)
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *values))
    except OmegaConfBaseException as error:
        missing = "Missing mandatory value" in str(error) or "MISSING" in type(error).__name__.upper()
        key = getattr(error, "full_key", None) or ""
        reason = f"'{key}=' is required" if missing else str(error).strip().split("\n")[0]
        if "is not a ListConfig" in reason:
            reason = "one value where a list is needed, such as [a,b]"
        raise ConfigError(
            f"{key}: {reason}" if key and not missing else reason, expected=_described(schema, key)
        ) from error
    assert isinstance(settings, schema)  # narrows the type
    return settings


def _require_kinds(schema: Any, values: Mapping[str, Any]) -> None:
    """Refuse a list for a mapping, a mapping for a list, and lists inside lists.

    OmegaConf takes the last, and ends with an error of Python's at the others.

    Raises:
        ConfigError: One of them.
    """
    hints = get_type_hints(schema)
    for key, value in values.items():
        kinds = {get_origin(kind) for kind in (hints.get(key), *get_args(hints.get(key)))}  # of `list[str] | None` too
        nested = [one for one in value if isinstance(one, _CONTAINERS)] if isinstance(value, _LISTS) else []
        if (dict in kinds and isinstance(value, _LISTS)) or (list in kinds and isinstance(value, _MAPPINGS)):
            raise ConfigError(f"{key}: {value}", expected=_described(schema, key))
        if list in kinds and nested:
            raise ConfigError(f"{key}: {nested[0]} inside a list", expected=_described(schema, key))


def require_known(keys: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first key that is not known, naming the nearest one."""
    names = sorted(known)
    for key in map(str, keys):
        name = key.partition(".")[0]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"unknown key '{key}'",
                expected=f"'{near[0]}'?" if near else f"one of: {', '.join(names)}",
                remedy="see --help for every key",
            )


def require_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of the known ones, naming the nearest one."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        raise ConfigError(
            f"unknown {key} '{value}'",
            expected=f"'{near[0]}'?" if near else f"one of: {', '.join(names)}",
            remedy=f"choose one of: {', '.join(names)}" if near else "",
        )


def require_least(config: Any, **least: int) -> None:
    """Refuse a number that is smaller than it makes sense.

    Args:
        config: The settings; one that is None is not given.
        least: Smallest value by name.

    Raises:
        ConfigError: One is smaller.
    """
    for name, value in least.items():
        found = getattr(config, name)
        if found is not None and found < value:
            raise ConfigError(f"{name}={found}", expected=f"{value} or more")


def changed(config: Any, names: Iterable[str]) -> list[str]:
    """Return, as `key=value`, the settings among some names that are not at their default."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    values = {name: getattr(config, name) for name in names}
    return [f"{name}={value}" for name, value in values.items() if value != _default(fields[name])]


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def describe(schema: Any) -> list[tuple[str, str, str]]:
    """Return (key, default with unit, help) of every field, the required ones first, for `--help`.

    A field whose default is a dataclass is described by that one's fields.
    """
    rows = []
    for field in dataclasses.fields(schema):
        default = _default(field)
        if dataclasses.is_dataclass(default):  # settings of a part, typed with a dot
            rows += [(f"{field.name}.{key}", shown, text) for key, shown, text in describe(type(default))]
            continue
        shown = "required" if default == MISSING else _as_typed(default)
        unit = field.metadata.get("unit", "")
        rows.append((field.name, f"{shown} {unit}".strip(), field.metadata.get("help", "")))
    return sorted(rows, key=lambda row: row[1] != "required")


def _as_typed(default: Any) -> str:
    """Return a default as one would type it; "not set" cannot be taken for a value, as "none" could."""
    if default is None:
        return "not set"
    if isinstance(default, bool):
        return str(default).lower()
    return f"[{','.join(map(str, default))}]" if isinstance(default, list) else str(default)


def _described(schema: Any, key: str) -> str:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    field = fields.get(key.partition(".")[0])
    return f"{field.name}: {field.metadata.get('help', field.type)}" if field else ""


def _split_all(words: Sequence[str]) -> dict[str, str]:
    """Return the words as keys and values; a key that is given twice is refused."""
    values: dict[str, str] = {}
    for key, value in map(_split, words):
        if key in values:
            raise ConfigError(f"'{key}' is given twice: {values[key]} and {value}", expected="each key once")
        values[key] = value
    return values


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"argument '{word}'", expected="key=value, such as target_macs=0.5")
    return key, value


def _nested(values: Mapping[str, str]) -> DictConfig:
    """Return a tree of settings: values read as YAML (with 1e-3 as a number), dots in keys as nesting."""
    tree = OmegaConf.create()
    for key, value in values.items():
        try:
            # YAML 1.1 would read 2:4 as a number of base 60, 124.
            word = f"'{value}'" if re.fullmatch(r"\d+(:\d+)+", value) else value
            tree.merge_with_dotlist([f"{key}={word}"])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{key}={value}", expected="a YAML value") from error
    return tree
