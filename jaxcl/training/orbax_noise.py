"""Hides what Orbax prints of failures that jaxcl raises as one line."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from typing import Any


class _NoTracebacks(logging.Filter):
    """Hides the tracebacks that Orbax logs: the failure itself is raised as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in record.pathname)


class _NoLostTasks(logging.Filter):
    """Hides that other writes of a save failed, too, which asyncio says when it finds them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        trace = record.exc_info[2] if record.exc_info else None
        frames = () if trace is None else traceback.walk_tb(trace)
        of_orbax = any(f"{os.sep}orbax{os.sep}" in frame.f_code.co_filename for frame, _ in frames)
        return not (of_orbax and "was never retrieved" in record.getMessage())


logging.getLogger("absl").addFilter(_NoTracebacks())
logging.getLogger("asyncio").addFilter(_NoLostTasks())


@functools.cache
def ignore_late_writes() -> None:
    """Hides the tracebacks of writes that end after their save has failed."""
    before = sys.unraisablehook

    def hook(details: Any) -> None:
        if not (isinstance(details.exc_value, RuntimeError) and "Event loop is closed" in str(details.exc_value)):
            before(details)

    sys.unraisablehook = hook
