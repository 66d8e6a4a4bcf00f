"""Tables from rows: for the terminal and, from the same rows, for Markdown."""

from __future__ import annotations

import io
from collections.abc import Container, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def render(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False, words: Container[str] = ()
) -> str:
    """Render a table.

    Args:
        columns: Headings; the first column is aligned left, the others right.
        rows: Cells, one per column.
        markdown: Markdown instead of lines drawn for a terminal.
        words: Further columns that are aligned left.
    """
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, show_edge=markdown, pad_edge=markdown)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    width = 4 + sum(3 + max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True))
    Console(file=stream, width=width, color_system=None, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines() if line.strip()) + "\n"


def quantity(value: float) -> str:
    """Return a count with its usual suffix, three significant digits: 4.37G, 3.16M, 512."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}" if value / factor < 100 else f"{value / factor:.0f}{suffix}"
    return f"{value:.0f}"
