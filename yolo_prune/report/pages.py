"""Pages from templates: one HTML file that needs nothing else, with every name escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from yolo_prune.report.table import quantity


def page(template: str, **content: Any) -> str:
    """Return a page.

    Args:
        template: File among the templates of the package.
        content: What it names.
    """
    # Names come from the user's files: without escaping, a layer called "<script>" would run.
    environment = Environment(
        loader=PackageLoader("yolo_prune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quantity": quantity, "count": count, "figure": figure, "share": share}
    return environment.get_template(template).render(**content) + "\n"


def count(value: float | None) -> Markup:
    """Show a count with its suffix; the exact one stays in the page."""
    return _data(value, "" if value is None else quantity(value))


def figure(value: float | None, digits: int = 3, sign: str = "") -> Markup:
    """Show a number with so many digits behind the point; the exact one stays in the page."""
    return _data(value, "" if value is None else f"{value:{sign}.{digits}f}")


def share(value: float | None) -> Markup:
    """Show a fraction as a percentage; the exact one stays in the page."""
    return _data(value, "" if value is None else f"{value:.1%}")


def _data(value: float | None, shown: str) -> Markup:
    return Markup("–") if value is None else Markup('<data value="{}">{}</data>').format(repr(value), shown)  # noqa: RUF001
