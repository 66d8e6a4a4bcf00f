"""Criteria that other packages bring, by the entry points `yolo_prune.criteria` of their distributions.

They are loaded with this module, not with the room: theirs imports that, and would be found half loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

from yolo_prune.errors import ConfigError
from yolo_prune.importance import BUILT_IN, Criterion, Normalization
from yolo_prune.importance.evidence import Need

NORMALIZATIONS, NEEDS = get_args(Normalization), set(get_args(Need))

GROUP = "yolo_prune.criteria"
"""In a `pyproject.toml`: `[project.entry-points."yolo_prune.criteria"]`, then `name = "package.module:CRITERION"`."""


def plugged_criteria(taken: Collection[str]) -> dict[str, Criterion]:
    """Return the criteria of other packages by name; one that does not load is warned of and left out.

    Args:
        taken: Names that are not theirs to take.
    """
    found: dict[str, Criterion] = {}
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = _loaded(point, [*taken, *found])
        except Exception as error:  # a stranger's module may fail in any way, which must not end all other work
            warnings.warn(f"criterion '{point.name}' of {_owner(point)} is left out: {error}", stacklevel=2)
    return found


def _loaded(point: EntryPoint, taken: Collection[str]) -> Criterion:
    """Return what an entry point names.

    Raises:
        ConfigError: It is no criterion, or its name is another's.
    """
    if point.name in taken:
        raise ConfigError(f"'{point.name}' is one of yolo_prune's own or of another package", expected="a free name")
    criterion: Criterion = point.load()
    if isinstance(criterion, type):
        raise ConfigError(f"'{point.value}' is a class", expected="an object of it")
    lacking = [name for name in ("name", "normalization", "needs", "score") if not hasattr(criterion, name)]
    if lacking:
        raise ConfigError(
            f"a {type(criterion).__name__} is no criterion, it lacks {', '.join(lacking)}",
            expected="yolo_prune.importance.Criterion",
        )
    if criterion.normalization not in NORMALIZATIONS or not set(criterion.needs) <= NEEDS:
        raise ConfigError(
            f"normalization {criterion.normalization!r} and needs {sorted(criterion.needs)}",
            expected=f"one of {', '.join(NORMALIZATIONS)}, and needs among {', '.join(sorted(NEEDS))}",
        )
    if criterion.name != point.name:
        raise ConfigError(f"it calls itself '{criterion.name}'", expected="the name of its entry point")
    return criterion


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


CRITERIA: Mapping[str, Criterion] = {**BUILT_IN, **plugged_criteria(taken=BUILT_IN)}
"""Every criterion by the name that the user types."""

BY_FILTERS = frozenset(name for name, one in CRITERIA.items() if getattr(one, "by_filters", False))
"""Criteria that score the filters of weights, and so can score the slices that read them as well."""
