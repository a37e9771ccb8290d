"""Hides what Orbax prints of failures that jaxcl raises as one line."""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any


class _NoTracebacks(logging.Filter):
    """Hides the tracebacks that Orbax logs: the failure itself is raised as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in record.pathname)


logging.getLogger("absl").addFilter(_NoTracebacks())


@functools.cache
def ignore_late_writes() -> None:
    """Hides the tracebacks of writes that end after their save has failed."""
    before = sys.unraisablehook

    def hook(details: Any) -> None:
        if not (isinstance(details.exc_value, RuntimeError) and "Event loop is closed" in str(details.exc_value)):
            before(details)

    sys.unraisablehook = hook
