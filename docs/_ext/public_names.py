"""The reference: a page per package, written from its `__all__`, and how the docstrings become pages."""

import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import pydantic
from sphinx.application import Sphinx

import jaxcl

_MODULE = """
```{{eval-rst}}
.. automodule:: {name}
```
"""
_MATHS = re.compile(r"\$([^$]+)\$")
_PROPERTIES: dict[str, list[str]] = {}


def write_pages(app: Sphinx) -> None:
    """Writes `reference/PACKAGE.md` for every package; a page that has not changed is left alone."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    for found in pkgutil.iter_modules(jaxcl.__path__, "jaxcl."):
        if found.ispkg:
            package = importlib.import_module(found.name)
            parts = [name for name in public(package) if isinstance(getattr(package, name), types.ModuleType)]
            blocks = [_MODULE.format(name=found.name)]
            blocks += [f"\n## {found.name}.{name}\n{_MODULE.format(name=f'{found.name}.{name}')}" for name in parts]
            write(folder / f"{found.name.removeprefix('jaxcl.')}.md", f"# {found.name}\n{''.join(blocks)}")


def public(package: types.ModuleType) -> list[str]:
    """The names of a package's `__all__`."""
    return list(getattr(package, "__all__", ()))


def write(path: Path, content: str) -> None:
    """Writes a file unless it already holds that."""
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")


def keep_property(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keeps a property's docstring, of which napoleon takes all before a colon for a type."""
    if what == "property":
        _PROPERTIES[name] = list(lines)


def mend_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Marks mathematics, and lists the keys of a section of the configuration."""
    lines[:] = _PROPERTIES.pop(name, lines)
    lines[:] = _MATHS.sub(r":math:`\1`", "\n".join(lines)).split("\n")
    if is_section(value):
        fields = {key: field.description for key, field in value.model_fields.items() if field.description}
        lines += ["", *(f":ivar {key}: {' '.join(text.split())}" for key, text in fields.items()), ""]


def mend_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Shortens jax's arrays to `Array`, and leaves out the signature of a section: its keys are listed below."""
    if is_section(value):
        return "", None
    given, result = (text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns))
    return given, result


def skip(app: Sphinx, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out docstrings written elsewhere: those of named tuples' fields and of members that pydantic adds."""
    alias = (inspect.getdoc(value) or "").startswith("Alias for field number")
    return True if alias or name.startswith("model_") or isinstance(value, types.ModuleType) else None


def is_section(value: Any) -> bool:
    """Whether it is a section of the configuration."""
    return inspect.isclass(value) and issubclass(value, pydantic.BaseModel)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects all of it."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", keep_property, priority=400)  # napoleon and what follows: 500
    app.connect("autodoc-process-docstring", mend_docstring)
    app.connect("autodoc-process-signature", mend_signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
