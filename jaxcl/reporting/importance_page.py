"""The page of `jaxcl importance`: which units a model needs for given tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxcl.reporting.page import page, text, write_page
from jaxcl.reporting.style import Picture
from jaxcl.reporting.tables import Tables, table_sections


def write_importance(folder: Path, tables: Tables, tasks: Sequence[str], *, title: str, note: str = "") -> Path:
    """Writes `importance.html`, and each of its pictures as a PNG, to a folder.

    Args:
      folder: created if absent.
      tables: a method's arrays by name.
      tasks: names of the tasks they were measured on.
      title: heading of the page.
      note: a sentence about what is missing; empty if nothing is.

    Returns:
      The page.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def draw(picture: Picture) -> str:
        picture.write_png(folder)
        return picture.svg()

    names = ' <span class="to">·</span> '.join(f"<bdi>{text(task)}</bdi>" for task in tasks)
    missing = f'<p class="warn">{text(note)}</p>' if note else ""
    header = (
        f'<header><p class="eyebrow">jaxcl importance</p><h1>{text(title)}</h1><p class="path">{names}</p>'
        f"{missing}</header>"
    )
    body = [header, *table_sections(tables, tasks, len(tasks), draw)]
    return write_page(folder / "importance.html", page(title, body))
