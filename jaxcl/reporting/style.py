"""The style of pictures: matplotlib settings, and SVG that takes its colours from the page."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, FAINT = "#1b1f24", "#5c6570", "#d9dee4", "#bcc5cf"
# Okabe and Ito's palette, which is distinguishable with the common forms of colour blindness, without yellow, which is
# hard to see on white. The page has lighter colours for dark mode.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b5b95", "#5c6570")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
HEAT = "viridis"
WIDTH = 10.4  # width in inches of a figure as wide as the page

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FAINT: "faint"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES[:-1])
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected and has the page's font
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,  # names of tasks are not formulas, even if they contain dollar signs
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def series_colour(index: int) -> str:
    """Colour of a series."""
    return SERIES[index % len(SERIES)]


def series_dash(index: int) -> Any:
    """Dash pattern of a series; series with the same colour have different ones."""
    return DASHES[index // len(SERIES) % len(DASHES)]


@contextlib.contextmanager
def styled(name: str) -> Iterator[None]:
    """Context with the style, for building a figure and converting it to SVG.

    Args:
      name: name of the figure, unique on the page: the picture's internal ids are derived from it.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Text is laid out with matplotlib's font, but shown in the reader's, which may have the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def grid(columns: int, rows: int, *, width: float = WIDTH, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with its axes in reading order. Call within `styled`.

    Args:
      columns: number of columns of axes.
      rows: number of rows of axes.
      width: width of the figure in inches.
      height: height of a row in inches.
      options: options of `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.07, hspace=0.04, wspace=0.03)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def per_row(count: int) -> int:
    """Number of panels per row, from 3 to 5 for more than 4 panels: that with the fullest rows."""
    if count <= 4:
        return max(count, 1)
    return min((5, 4, 3), key=lambda columns: (-count % columns, -columns))


def panels(count: int, *, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, in as many rows as it takes, and what is left of the last row empty; see `grid`."""
    columns = per_row(count)
    figure, axes = grid(columns, -(-count // columns), height=height, **options)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def outer_labels(axes: Sequence[Axes], columns: int, count: int, x_label: str, y_label: str) -> None:
    """Labels the outer panels only; panels above an empty place are outer, too."""
    for index, axis in enumerate(axes[:count]):
        if index % columns == 0:
            axis.set_ylabel(y_label)
        if index + columns >= count:
            axis.set_xlabel(x_label)
            axis.tick_params(labelbottom=True)


class Picture(NamedTuple):
    """A figure that can be shown on a page or saved to a file.

    Attributes:
      figure: the figure.
      name: unique on the page.
      label: what it shows, as alternative text.
    """

    figure: Figure
    name: str
    label: str

    def svg(self) -> str:
        """An inline SVG element; see `svg`."""
        with styled(self.name):
            return svg(self.figure, self.label)

    def write_png(self, folder: Path) -> Path:
        """Writes `NAME.png`, on white, to a folder."""
        path = folder / f"{self.name.replace(' ', '_')}.png"
        with styled(self.name):
            self.figure.savefig(path, dpi=160, facecolor="white")
        return path


def svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element with the colours and font of the page. Call within `styled`.

    Args:
      figure: the figure.
      label: what it shows, as alternative text.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet in the SVG would apply to the whole page; the page has the same rule for pictures.
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.S)
    # Colours and fonts are in attributes; the text between tags is not changed.
    text = re.sub(r"<[^>]*>", lambda tag: _themed(tag.group()), text)
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None  # print_svg always writes it
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    alternative = escape(printable(label), quote=True)
    attributes = f'{spaces} {view.group()} role="img" aria-label="{alternative}" style="--pt-width:{_width(head)}"'
    return f"<svg {attributes}>{rest.strip()}"


def short(text: str, limit: int) -> str:
    """One line of at most `limit` characters, for labels.

    >>> short("a task with a long name", 10)
    'a task wi…'
    """
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def ticks(titles: Sequence[str], room: int) -> list[str]:
    """Labels below an axis: titles, if each has at most `room` characters, else their first words (mostly numbers).

    >>> ticks(["general", "1 reviews"], 9), ticks(["general", "1 reviews"], 7)
    (['general', '1 reviews'], ['general', '1'])
    """
    whole = all(len(title) <= room for title in titles)
    return [short(title if whole else title.split(" ")[0], max(room, 7)) for title in titles]


def printable(text: str) -> str:
    """Text that HTML and SVG allow: control characters and lone surrogates become the replacement character."""
    return "".join("\ufffd" if _unprintable(character) else character for character in text)


def _unprintable(character: str) -> bool:
    control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return control or character in "\ufffe\uffff"


def _themed(tag: str) -> str:
    def variable(match: re.Match[str]) -> str:
        colour = match.group().lower()
        return f"var(--{_VARIABLES[colour]}, {colour})" if colour in _VARIABLES else match.group()

    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)  # not unique on the page, and not referred to
    tag = re.sub(r"#[0-9a-fA-F]{6}\b", variable, tag)
    # matplotlib writes either the shorthand or the longhand property.
    tag = re.sub(r"(font: [^;\"']*?\d(?:\.\d+)?px )[^;\"]*", r"\1var(--font, sans-serif)", tag)
    return re.sub(r"(font-family: )[^;\"]*", r"\1var(--font, sans-serif)", tag)


def _width(head: str) -> str:
    found = re.search(r'width="([\d.]+)pt"', head)
    return found.group(1) if found else "720"
