"""Plots as SVG that is part of a page: its colours are the page's, its text is text, and it has a name.

Matplotlib draws them in placeholder colours, which become CSS variables; so one plot serves light, dark and print.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

VARIABLES = ("ink", "soft", "line", "dense", "slim", "control", "direct", "smaller", "accent")
"""CSS variables of the page's style, without their dashes."""

COLOURS = MappingProxyType({name: f"#0000{index:02x}" for index, name in enumerate(VARIABLES, start=1)})
"""Placeholder of each variable: colours that nothing else has."""

MARKERS = MappingProxyType({"dense": "s", "slim": "o", "control": "^", "direct": "D", "smaller": "v"})
"""Marks of models: a shape of its own beside its colour."""

STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "yolo_prune", "text.parse_math": False,  # names hold dollar signs
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False, "grid.linewidth": 0.6,
    "axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["soft"], "grid.color": COLOURS["line"],
    "xtick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["soft"], "text.color": COLOURS["ink"],
    "ytick.color": COLOURS["line"], "ytick.labelcolor": COLOURS["soft"], "legend.labelcolor": COLOURS["ink"],
}  # fmt: skip


@dataclass
class Plot:
    """A plot of a page.

    Attributes:
        name: Unique in the page; prefix of its identifiers.
        title: What it shows, for those who do not see it.
        description: What is to be read from it.
        wide: It needs the whole width of a page, and is scrolled where there is less.
        width_px: Its natural width.
        svg: The finished drawing.
    """

    name: str
    title: str
    description: str
    wide: bool = False
    width_px: int = field(default=0, init=False)
    svg: Markup = field(default=Markup(), init=False)


@contextlib.contextmanager
def drawing(plot: Plot, *, columns: int = 1, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """Yield axes to draw on; at the end `plot` holds the drawing.

    Args:
        plot: The plot.
        columns: Of panels, side by side.
        size: Width and height in inches.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are typed as literals
        figure = Figure(figsize=size, layout="constrained")  # without the global state of pyplot
        panels = figure.subplots(1, columns, squeeze=False)
        yield list(panels.flat)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    plot.width_px = round(96 * size[0])
    plot.svg = inlined(stream.getvalue(), plot)


def inlined(document: str, plot: Plot) -> Markup:
    """Return an SVG document as an element of an HTML page.

    Its identifiers get a prefix, since a page has several drawings; its size is left to the page's style.
    """
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(document)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        reference = element.attrib.pop(f"{{{XLINK}}}href", None)
        if reference:
            element.set("href", f"#{plot.name}-{reference.removeprefix('#')}")
        if "id" in element.attrib:
            element.set("id", f"{plot.name}-{element.get('id')}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{plot.name}-"))
    for place, (tag, text) in enumerate((("title", plot.title), ("desc", plot.description))):
        named = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{plot.name}-{tag}"})
        named.text = text
        root.insert(place, named)
    root.set("role", "img")
    root.set("aria-labelledby", f"{plot.name}-title {plot.name}-desc")
    for size in ("width", "height"):
        root.attrib.pop(size)
    text = ElementTree.tostring(root, encoding="unicode")
    return Markup(_coloured(text))  # ElementTree escaped every name in it


def _coloured(text: str) -> str:
    """Replace placeholders by the variables that they stand for."""
    names = {placeholder: name for name, placeholder in COLOURS.items()}
    return re.sub(r"#0000[0-9a-f]{2}(?=[;\"\s])", lambda found: f"var(--{names[found.group()]})", text)
