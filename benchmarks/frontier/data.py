"""The rows that the testbeds learn: formed from small benchmark files, written to a folder outside the project.

Passages and prompts that are equal are kept once, and split by a hash of their text: no row is in two splits.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, str]
SPLITS = ("dev", "test", "train")
_MARKS = re.compile(r"\[\[|\]\]|<<|>>")


def data_root() -> Path:
    """Folder of the benchmark files: `JAXCL_DATA`, or `../shared/data` beside the checkout.

    Raises:
      SystemExit: it is not there.
    """
    root = Path(os.environ.get("JAXCL_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data").resolve()
    if not (root / "frontier" / "model" / "config.json").is_file():
        raise SystemExit(f"{root}: no frontier/model there; set JAXCL_DATA to the folder of the benchmark files")
    return root


# Text domains: unlike each other, and not part of the general text that the model knows.


def _passages(name: str) -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        with gzip.open(root / f"das/domains/{name}.txt.gz", "rt", encoding="utf-8") as file:
            yield from file

    return read


def stories(root: Path) -> Iterator[str]:
    """Five-sentence everyday stories, from the prompts of SuperNI's task748."""
    for row in _json(root / "superni/task748"):
        if found := re.search(r"story: (.*?)\n\s*selected sentence:", row["prompt"], re.DOTALL):
            yield found[1]


def papers(root: Path) -> Iterator[str]:
    """Sentences of papers on language processing, from the end tasks SciERC and ACL-ARC."""
    for row in itertools.chain(_jsonl(root / "das/end_tasks/scierc"), _jsonl(root / "das/end_tasks/aclarc")):
        yield _MARKS.sub("", row["text"])


DOMAINS: dict[str, Callable[[Path], Iterable[str]]] = {
    "reviews": _passages("restaurant_reviews"),
    "biomedical": _passages("biomedical_abstracts"),
    "stories": stories,
    "papers": papers,
}


# Instruction tasks: short prompts without the definition; answers from a closed set, whose first tokens differ.


def relation(root: Path) -> Iterator[Row]:
    """Lexical relation of two words in a sentence about them (SuperNI task1510); relations with 30 rows or more."""
    words = {
        "Antonym": "opposite",
        "HasProperty": "property",
        "HasA": "owner",
        "IsA": "kind",
        "Synonym": "same",
        "MadeOf": "material",
        "PartOf": "part",
    }
    for row in _json(root / "superni/task1510"):
        if (name := row["answer"].split()[1]) in words:
            yield _row(_superni_input(row["prompt"]), "Relation:", words[name])


def polarity(root: Path) -> Iterator[Row]:
    """Polarity of a sentence of a film review (SuperNI task363)."""
    for row in _json(root / "superni/task363"):
        yield _row(_superni_input(row["prompt"]), "Polarity:", row["answer"])


def stance(root: Path) -> Iterator[Row]:
    """Monetary policy stance of a sentence (FOMC, of TRACE)."""
    words = {"A": "soft", "B": "hard", "C": "neutral"}
    for row in _json(root / "trace/FOMC"):
        text = row["prompt"].split("Text:\n", 1)[1].rsplit("\nStance:", 1)[0]
        yield _row(text, "Stance:", words[row["answer"]])


def aspect(root: Path) -> Iterator[Row]:
    """Sentiment on an aspect of a restaurant."""
    words = {"positive": "good", "negative": "bad", "neutral": "neither"}
    for row in _jsonl(root / "das/end_tasks/restaurant"):
        yield _row(row["text"], f"Opinion on {row['aspect']}:", words[row["label"]])


def chemprot(root: Path) -> Iterator[Row]:
    """Effect of a chemical on a protein (ChemProt); the six most frequent classes."""
    words = {
        "INHIBITOR": "inhibitor",
        "SUBSTRATE": "substrate",
        "INDIRECT-DOWNREGULATOR": "down",
        "INDIRECT-UPREGULATOR": "up",
        "ACTIVATOR": "activator",
        "ANTAGONIST": "blocker",
    }
    for row in _jsonl(root / "das/end_tasks/chemprot"):
        if row["label"] in words:
            yield _row(row["text"], "Effect:", words[row["label"]])


def links(root: Path) -> Iterator[Row]:
    """How two terms of a paper's sentence are linked (SciERC)."""
    words = {
        "USED-FOR": "used",
        "CONJUNCTION": "and",
        "EVALUATE-FOR": "measure",
        "HYPONYM-OF": "kind",
        "PART-OF": "part",
        "FEATURE-OF": "feature",
        "COMPARE": "compared",
    }
    for row in _jsonl(root / "das/end_tasks/scierc"):
        yield _row(row["text"], "Link:", words[row["label"]])


def category(root: Path) -> Iterator[Row]:
    """General category of a character, by its name (the Python library's Unicode tables)."""
    words = {
        "other punctuation": "punctuation",
        "decimal digit": "digit",
        "uppercase letter": "upper",
        "lowercase letter": "lower",
        "modifier letter": "raised",
        "other symbol": "symbol",
        "math symbol": "math",
        "spacing mark": "vowel",
        "other letter": "letter",
    }
    yield from _embedded("unicode_category", words, "Category:")


def direction(root: Path) -> Iterator[Row]:
    """Bidirectional class of a character, by its name (the Python library's Unicode tables)."""
    words = {
        "right to left": "left",
        "left to right": "right",
        "other neutral": "neutral",
        "arabic letter": "arabic",
        "nonspacing mark": "mark",
        "european number": "european",
        "boundary neutral": "boundary",
        "number terminator": "end",
    }
    yield from _embedded("unicode_bidi", words, "Direction:")


def number(root: Path) -> Iterator[Row]:
    """Numeric value of a character, by its name (the Python library's Unicode tables)."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    yield from _embedded("unicode_numeric", {str(digit): word for digit, word in enumerate(words)}, "Value:")


def _embedded(name: str, words: dict[str, str], question: str) -> Iterator[Row]:
    from jaxcl.data.sources import load_source

    source = load_source(f"stdlib:{name}")
    for row in itertools.chain(source.train, source.dev, source.test):
        if row["answer"] in words:
            text = row["prompt"].rsplit("\n", 1)[0]
            yield _row(text, question, words[row["answer"]])


TASKS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "relation": relation,
    "polarity": polarity,
    "stance": stance,
    "aspect": aspect,
    "chemprot": chemprot,
    "links": links,
    "category": category,
    "direction": direction,
    "number": number,
}


def write_domain(name: str, root: Path, folder: Path, characters: int) -> Path:
    """Writes a text domain as `train.txt`, `dev.txt` and `test.txt`, unless they are there.

    Args:
      name: one of `DOMAINS`.
      root: folder of the benchmark files.
      folder: gets a folder of that name.
      characters: of the training passages, at most.

    Returns:
      That folder.
    """
    passages = dict.fromkeys(" ".join(text.split()) for text in DOMAINS[name](root))
    passages.pop("", None)
    splits = _split(list(passages), str)
    used = itertools.accumulate(map(len, splits["train"]))
    splits["train"] = [row for row, total in zip(splits["train"], used, strict=True) if total <= characters]
    return _write(folder / name, ".txt", splits, lambda rows: "\n".join(rows) + "\n")


def write_task(name: str, root: Path, folder: Path) -> Path:
    """Writes an instruction task as `train.json`, `dev.json` and `test.json`; see `write_domain`."""
    rows = list({row["prompt"]: row for row in TASKS[name](root)}.values())
    return _write(folder / name, ".json", _split(rows, lambda row: row["prompt"]), json.dumps)


def _split(rows: list, text: Callable[[Any], str]) -> dict[str, list]:
    """A tenth each for dev and test, or 250 rows if that is more, but at most a fifth."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(text(row).encode()).digest())
    held = max(len(rows) // 10, min(250, len(rows) // 5))
    return {"dev": rows[:held], "test": rows[held : 2 * held], "train": rows[2 * held :]}


def _write(folder: Path, suffix: str, splits: dict[str, list], encode: Callable[[list], str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        path = folder / f"{split}{suffix}"
        if not path.is_file():
            partial = path.with_name(f"{path.name}.{os.getpid()}")  # other processes may write the same
            partial.write_text(encode(splits[split]), encoding="utf-8")
            partial.replace(path)
    return folder


def _row(text: str, question: str, answer: str) -> Row:
    # The space belongs to the answer: its first token is then that of a word.
    return {"prompt": f"{' '.join(text.split())}\n{question} ", "answer": answer}


def _superni_input(prompt: str) -> str:
    return prompt.split("Input: ", 1)[1].rsplit("\nOutput:", 1)[0]


def _json(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("*.json")):
        yield from json.loads(path.read_text(encoding="utf-8"))


def _jsonl(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
