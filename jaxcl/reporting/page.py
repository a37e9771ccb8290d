"""The HTML of reports: one style for screen, dark mode and paper; no scripts, and nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape as _escape
from pathlib import Path
from urllib.parse import quote

from jaxcl.reporting.style import DASH, MINUS, printable
from jaxcl.reporting.style_sheet import STYLE_SHEET


def text(value: object) -> str:
    r"""A value as text that is safe between tags and in quoted attributes.

    >>> text("<script>'\x00")
    '&lt;script&gt;&#x27;�'
    """
    return _escape(printable(str(value)), quote=True)


def address(path: str) -> str:
    """A relative path as the address of a link.

    >>> address("ewc-strength=1-seed0")
    'ewc-strength%3D1-seed0'
    """
    return text(quote(path))


def page(title: str, body: Iterable[str]) -> str:
    """A complete HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The page loads nothing, and no text of a task can change that.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_page(path: Path, content: str) -> Path:
    """Writes a page, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # may be a link to another file
    with open(partial, "x", encoding="utf-8", errors="replace") as file:
        file.write(content)
    os.replace(partial, path)
    return path


def section(heading: str, *parts: str, note: str = "") -> str:
    """A section with a heading, a note on how to read it (HTML), and its parts; empty if all parts are."""
    if not any(parts):
        return ""
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{text(heading)}</h2>{lead}{''.join(parts)}</section>"


def figure(picture: str, caption: str = "") -> str:
    """A picture (an SVG element) with a caption (HTML)."""
    under = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{picture}{under}</figure>"


def card(name: str, value: str, unit: str, meaning: str, tone: str = "") -> str:
    """A headline number with its meaning; `tone` is `good`, `bad` or empty."""
    small = f"<small>{text(unit)}</small>" if unit else ""
    return (
        f'<div class="card"><b>{text(name)}</b><div class="value {tone}">{text(value)}{small}</div>'
        f"<span>{text(meaning)}</span></div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of HTML cells; `numbers` are the right-aligned columns."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        plain = ' class="long"' if tag == "td" else ""
        marks = [' class="number"' if column in right else plain for column in range(len(row))]
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def details(summary: str, content: str, *, opened: bool = False, printed: bool = True) -> str:
    """A foldable part (without scripts), unfolded on paper if `printed`; `summary` and `content` are HTML."""
    attributes = ("" if printed else ' class="raw"') + (" open" if opened else "")
    return f"<details{attributes}><summary>{summary}</summary><div>{content}</div></details>"


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """A number as text, with a true minus sign; a dash if there is no number.

    >>> number(-3.14159), number(2.0, signed=True), number(None), number(-0.01)
    ('−3.1', '+2.0', '–', '0.0')
    """
    if value is None or value != value:
        return DASH
    rounded = round(float(value), digits) + 0.0  # never -0.0
    if abs(rounded) >= 1e5:
        return f"{rounded:.2e}"
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Seconds as text.

    >>> duration(4.24), duration(75), duration(3720)
    ('4.2 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(count: float, base: int = 1000, suffix: str = "") -> str:
    """A count as text, with a prefix.

    >>> size(134_515_008), size(2048, 1024, "B"), size(12)
    ('135M', '2.0 KiB', '12')
    """
    prefixes = ["", "k", "M", "G", "T"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    power = 0
    while count >= base and power < len(prefixes) - 1:
        count, power = count / base, power + 1
    digits = 1 if power and count < 10 else 0
    return f"{count:.{digits}f}{' ' if suffix else ''}{prefixes[power]}{suffix}"
