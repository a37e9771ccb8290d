"""The one error type that a user sees as a single line, and hints for its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave (a config value, a file, a run folder) cannot be used.

    The message is one line: what was wrong, where, what is allowed. The command line prints it without a
    traceback; programs may catch it.

    Attributes:
      exit_code: 2 for bad usage or a bad configuration, 1 for a failure while running.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean X?`, when some valid name is close to `name`, else `;`: what is allowed is said behind it.

    >>> nearest("seker", ["seekr", "das"]), nearest("x", ["seekr", "das"])
    ('; did you mean seekr?', ';')
    """
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ";"
