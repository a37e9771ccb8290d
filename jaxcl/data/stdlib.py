"""Sources available on every machine: tables and texts of the standard library, docstrings of installed packages.

A hash of an example's text decides its split and whether it is kept from a large class, so both are the same on every
machine and do not depend on other examples.
"""

from __future__ import annotations

import ast
import difflib
import errno
import functools
import html.entities
import http
import importlib.util
import mimetypes
import os
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxcl.data.embedded import Embedded, Row, rank, split_rows
from jaxcl.data.spec import Kind
from jaxcl.errors import UserError

# Largest number of examples per class of a table, so that no class dominates; smaller classes than _FEWEST are dropped.
_MOST, _FEWEST = 300, 25
# End tasks: largest number of classes, and smallest and largest number of passages per class.
_LABELS, _LABEL_FEWEST, _LABEL_MOST = 12, 30, 400
_TOPIC_FEWEST = 14
# Largest number of source files read per package, spread evenly: large packages have thousands.
_FILES = 700
# Characters per passage: shorter docstrings are skipped; paragraphs of topics are joined up to the second number.
_SHORTEST, _PASSAGE = 80, 400


class _Source(NamedTuple):
    kind: Kind
    read: Callable[..., Embedded]


def read_stdlib(name: str) -> Embedded:
    """Reads an embedded source.

    Args:
      name: one of `names()`; `docstrings:PACKAGE` and `submodules:PACKAGE` read an installed package.

    Raises:
      UserError: unknown source, or the package is not installed.

    >>> read_stdlib("http_status").splits["train"][0].keys()
    dict_keys(['prompt', 'answer'])
    """
    source, package = _find(name)
    return source.read(*package)


def stdlib_kind(name: str) -> Kind:
    """The kind of an embedded source's rows; reads nothing.

    Args:
      name: as for `read_stdlib`.

    Raises:
      UserError: there is no such source.

    >>> stdlib_kind("docstrings:numpy")
    'text'
    """
    return _find(name)[0].kind


def _find(name: str) -> tuple[_Source, tuple[str, ...]]:
    """A source by its name, and the package where the name has one."""
    base, colon, package = name.partition(":")
    if colon and base in _PACKAGE_SOURCES:
        return _PACKAGE_SOURCES[base], (package,)
    if name in _SOURCES:
        return _SOURCES[name], ()
    near = difflib.get_close_matches(name, [*_SOURCES, *_PACKAGE_SOURCES], n=1, cutoff=0.0)[0]
    raise UserError(f"source stdlib:{name} is not known; nearest is {near}; allowed: {', '.join(names())}")


def names() -> list[str]:
    """Names of all embedded sources."""
    return [*_SOURCES, *(f"{name}:PACKAGE" for name in _PACKAGE_SOURCES)]


def _balanced(pairs: Iterable[tuple[str, str]], most: int, fewest: int) -> list[tuple[str, str]]:
    """(text, class) pairs, at most `most` per class, without classes that have fewer than `fewest`."""
    classes: dict[str, list[str]] = defaultdict(list)
    for text, label in pairs:
        classes[label].append(text)
    return [
        (text, label)
        for label, texts in sorted(classes.items())
        if len(texts) >= fewest
        for text in sorted(sorted(texts, key=rank)[:most])
    ]


# ---------------------------------------------------------------- tables of unicodedata

_CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "other letter",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Me": "enclosing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "other number",
    "Pc": "connector punctuation",
    "Pd": "dash punctuation",
    "Ps": "open punctuation",
    "Pe": "close punctuation",
    "Pi": "initial quote",
    "Pf": "final quote",
    "Po": "other punctuation",
    "Sm": "math symbol",
    "Sc": "currency symbol",
    "Sk": "modifier symbol",
    "So": "other symbol",
    "Zs": "space separator",
    "Cf": "format control",
}
_DIRECTIONS = {
    "L": "left to right",
    "R": "right to left",
    "AL": "arabic letter",
    "EN": "european number",
    "ET": "number terminator",
    "AN": "arabic number",
    "NSM": "nonspacing mark",
    "BN": "boundary neutral",
    "ON": "other neutral",
}
# Each has thousands of names that differ only in a syllable or number.
_MASS_NAMES = ("HANGUL SYLLABLE", "YI SYLLABLE", "CUNEIFORM", "CANADIAN SYLLABICS", "BRAILLE PATTERN")


@functools.cache
def _characters() -> tuple[tuple[str, str], ...]:
    """Characters and their names, without names that contain digits or belong to `_MASS_NAMES`."""
    found = ((chr(code), unicodedata.name(chr(code), "")) for code in range(sys.maxunicode + 1))
    return tuple(
        (character, name)
        for character, name in found
        if name and not any(c.isdigit() for c in name) and not name.startswith(_MASS_NAMES)
    )


def _unicode_table(question: str, answer: Callable[[str], str | None]) -> Embedded:
    pairs = [(name, found) for character, name in _characters() if (found := answer(character)) is not None]
    rows = [{"prompt": f"{name}\n{question}:", "answer": found} for name, found in _balanced(pairs, _MOST, _FEWEST)]
    return Embedded(split_rows(rows, lambda row: row["prompt"]))


def _numeric(character: str) -> str | None:
    value = unicodedata.numeric(character, None)
    # Fractions are left out: none of their classes would be large enough.
    return str(int(value)) if value is not None and value == int(value) else None


def _unicode_category() -> Embedded:
    return _unicode_table("Category", lambda character: _CATEGORIES.get(unicodedata.category(character)))


def _unicode_numeric() -> Embedded:
    return _unicode_table("Numeric value", _numeric)


def _unicode_bidi() -> Embedded:
    return _unicode_table("Direction", lambda character: _DIRECTIONS.get(unicodedata.bidirectional(character)))


def _html_entity() -> Embedded:
    rows = []
    for entity, text in sorted(html.entities.html5.items()):
        name = unicodedata.name(text, "") if len(text) == 1 else ""
        if entity.endswith(";") and name:
            rows.append({"prompt": f"&{entity}\nCharacter:", "answer": name.lower()})
    return Embedded(split_rows(rows, lambda row: row["prompt"]))


# ---------------------------------------------------------------- tables of facts


def _facts(facts: Iterable[tuple[str, str]], wordings: Sequence[str]) -> Embedded:
    """Facts that have to be memorised: each is learned in some wordings and tested in others.

    Every wording is learned with some facts, so that the test asks for known facts in known wordings, but never in a
    combination seen in training.
    """
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for thing, answer in facts:
        prompts = sorted((wording.format(thing) for wording in wordings), key=rank)
        for number, prompt in enumerate(prompts):
            split = ("test", "dev")[number] if number < 2 else "train"
            splits[split].append({"prompt": prompt, "answer": answer})
    return Embedded(splits)


def _http_status() -> Embedded:
    wordings = (
        "HTTP status {}\nMeaning:",
        "What does HTTP {} mean?\nAnswer:",
        "The server replied with code {}, that is",
        "Status line: HTTP/1.1 {}",
        "Explain status code {} briefly:",
        "{} is the HTTP status",
    )
    return _facts(((str(status.value), status.phrase) for status in http.HTTPStatus), wordings)


def _mimetypes() -> Embedded:
    wordings = (
        "file.{}\nContent type:",
        "What is the MIME type of .{} files?\nAnswer:",
        "A file that ends in .{} is served as",
        "Content-Disposition: name=x.{}\nContent-Type:",
        "The extension {} belongs to the type",
        "{} files have the media type",
    )
    # Python's own table, without files of the operating system.
    types = mimetypes.MimeTypes(filenames=()).types_map[True]
    return _facts(((extension.lstrip("."), kind) for extension, kind in sorted(types.items())), wordings)


def _errno() -> Embedded:
    wordings = (
        "{}\nMeaning:",
        "What does errno {} mean?\nAnswer:",
        "The system call failed with {}:",
        "OSError({}):",
        "Explain the error {} briefly:",
        "{} stands for",
    )
    return _facts(((name, os.strerror(number)) for number, name in sorted(errno.errorcode.items())), wordings)


# ---------------------------------------------------------------- texts


def _text(passages: Iterable[str]) -> Embedded:
    return Embedded(split_rows(({"text": passage} for passage in passages), lambda row: row["text"]))


def _labelled(passages: Iterable[tuple[str, str]], what: str, fewest: int) -> Embedded:
    """The end task of a domain: the same passages in the same splits, so that no test passage was trained on."""
    passages = list(passages)
    counts = Counter(label for _, label in passages)
    common = {label for label, count in counts.most_common(_LABELS) if count >= fewest}
    kept = _balanced((one for one in passages if one[1] in common), _LABEL_MOST, 1)
    labels = tuple(sorted(common))
    if len(labels) < 2:
        raise UserError(f"{what}: fewer than two labels have {fewest} passages")
    rows = [{"text": passage, "label": label} for passage, label in kept]
    return Embedded(split_rows(rows, lambda row: row["text"]), labels)


@functools.cache
def _topic_passages() -> tuple[tuple[str, str], ...]:
    """Passages of the language reference and their topics; one in several topics belongs to the shortest topic."""
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        passage = ""
        for paragraph in text.split("\n\n"):
            lines = [line.rstrip() for line in paragraph.split("\n")]
            kept = "\n".join(line for line in lines if len(set(line.strip())) > 1)  # drops lines of * or =
            passage = f"{passage}\n\n{kept}".strip("\n")
            if len(passage) >= _PASSAGE:
                found.setdefault(passage, topic)
                passage = ""
        if len(passage) >= _SHORTEST:
            found.setdefault(passage, topic)
    return tuple(found.items())


@functools.cache
def _docstrings(package: str) -> tuple[tuple[str, str], ...]:
    """Docstrings of a package's source files and their submodules; the package is not imported."""
    root = _package_folder(package)
    files = [path for path in sorted(root.rglob("*.py")) if not _is_test(path.relative_to(root))]
    files = files[:: max(1, -(-len(files) // _FILES))]
    found: dict[str, tuple[str, ...]] = {}
    for path in files:
        module = path.relative_to(root).with_suffix("").parts
        for docstring in _docstrings_of(path):
            if len(docstring) >= _SHORTEST:
                found.setdefault(docstring, module)
    if not found:
        raise UserError(f"package {package} in {root} has no docstrings of {_SHORTEST} characters or more")
    return tuple(_by_submodule(found, package))


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"source stdlib:docstrings:{package}: no package {package!r} with source files is installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _is_test(path: Path) -> bool:
    return any(part in ("tests", "test", "testing") or part.startswith("test_") for part in path.parts)


def _docstrings_of(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes))
    return [docstring for docstring in found if docstring]


def _by_submodule(found: dict[str, tuple[str, ...]], package: str) -> Iterable[tuple[str, str]]:
    """Labels docstrings with the level of their module's path that distinguishes them.

    In a folder with more than half of all docstrings (`jax/_src`, `transformers/models`) that is the next level.
    """
    modules = dict(found)
    for _ in range(2):
        counts = Counter(module[0] for module in modules.values())
        largest, count = counts.most_common(1)[0]
        if 2 * count <= len(modules):
            break
        modules = {
            text: module[1:] if module[0] == largest and len(module) > 1 else module for text, module in modules.items()
        }
    for text, module in modules.items():
        yield text, package if module[0] == "__init__" else module[0].strip("_")


def _read_docstrings(package: str) -> Embedded:
    return _text(text for text, _ in _docstrings(package))


def _read_submodules(package: str) -> Embedded:
    return _labelled(_docstrings(package), f"source stdlib:submodules:{package}", _LABEL_FEWEST)


def _python_topics() -> Embedded:
    return _text(text for text, _ in _topic_passages())


def _python_topic_names() -> Embedded:
    return _labelled(_topic_passages(), "source stdlib:python_topic_names", _TOPIC_FEWEST)


_SOURCES: dict[str, _Source] = {
    "unicode_category": _Source("pairs", _unicode_category),
    "unicode_numeric": _Source("pairs", _unicode_numeric),
    "unicode_bidi": _Source("pairs", _unicode_bidi),
    "html_entity": _Source("pairs", _html_entity),
    "http_status": _Source("pairs", _http_status),
    "mimetypes": _Source("pairs", _mimetypes),
    "errno": _Source("pairs", _errno),
    "python_topics": _Source("text", _python_topics),
    "python_topic_names": _Source("labelled", _python_topic_names),
}
_PACKAGE_SOURCES: dict[str, _Source] = {
    "docstrings": _Source("text", _read_docstrings),
    "submodules": _Source("labelled", _read_submodules),
}
