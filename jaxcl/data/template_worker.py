"""Renders chat templates in a process of its own, whose memory and time are limited.

A template of a downloaded model is a program. The sandbox of transformers keeps it from files and from Python's
internals, but not from loops without end or texts of gigabytes. So a worker renders: one process, started at the first
template and used for all that follow, with a limit of processor time for each conversation and one of memory in all.
The time is the worker's own, so a busy machine or a debugger changes nothing, and no clock is watched here.

A worker is `python -m jaxcl.data.template_worker`. Requests and answers are JSON, each after its length.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxcl.data.workers import program
from jaxcl.errors import UserError

Conversation = Sequence[Mapping[str, Any]]
#: A text, and starts and stops of what a template marks in it.
Rendered = tuple[str, list[tuple[int, int]]]

#: Seconds of processor time for a conversation, and characters for which there is a further second.
SECONDS, SECOND = 2, 2**22
#: Bytes that the worker may take beyond what it starts with.
MEMORY = 2**30
#: Characters that a rendering may have, beyond `TIMES` times those of the messages.
LONGEST, TIMES = 2**22, 16
# Sent at once: few enough to stay small, enough that waiting for the other process does not count.
_CONVERSATIONS, _CHARACTERS = 256, 2**20
_PREFIX = 8
_MESSAGE = 500


class TemplateError(Exception):
    """A template cannot render a conversation.

    Attributes:
      index: the conversation's place among those given.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def render(
    template: str,
    conversations: Sequence[Conversation],
    variables: Mapping[str, str],
    *,
    ask: bool = False,
    learned: bool = False,
    trusted: bool = False,
) -> list[Rendered]:
    """Renders conversations as `apply_chat_template` of transformers does.

    Args:
      template: the template (Jinja).
      conversations: roles and contents.
      variables: further variables of the template.
      ask: end with the generation prompt.
      learned: return the places of what `{% generation %}` marks; otherwise they are empty.
      trusted: render here, without limits.

    Raises:
      TemplateError: the template fails with the first such conversation, or takes more than it may.
      UserError: the worker cannot be started.
    """
    request = {"template": template, "variables": dict(variables), "ask": ask, "learned": learned}
    if trusted:
        found = []
        for index, messages in enumerate(conversations):
            answer = _answer(request, messages)
            if isinstance(answer, str):
                raise TemplateError(index, answer)
            found.append(answer)
        return found
    with _lock:
        return [one for start, part in _parts(conversations) for one in _worker().ask(request, part, start)]


def _parts(conversations: Sequence[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """What is sent at once, each with the number of its first conversation."""
    part: list[Conversation] = []
    size = 0
    for index, messages in enumerate(conversations):
        if part and (len(part) == _CONVERSATIONS or size >= _CHARACTERS):
            yield index - len(part), part
            part, size = [], 0
        part.append(messages)
        size += _size(messages)
    if part:
        yield len(conversations) - len(part), part


def _size(messages: Conversation) -> int:
    contents = (message["content"] for message in messages)
    return sum(len(one) if isinstance(one, str) else sum(len(part.get("text", "")) for part in one) for one in contents)


class _Worker:
    """The process that renders, as this process sees it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        # It needs no framework, which transformers would look for.
        command, environment = program("jaxcl.data.template_worker", USE_TORCH="0")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interruption is for this process, which then closes the worker's input
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        if (ready := _read(self._output, _MESSAGE * 8)) is not True:
            self.close()
            raise UserError(f"the process that renders chat templates does not start: {ready or 'it ended'}")

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and not self._input.closed and self._process.poll() is None

    def ask(self, request: Mapping[str, Any], part: Sequence[Conversation], start: int) -> Iterator[Rendered]:
        """Renders conversations; a failure is that of number `start` plus its place."""
        left = len(part)
        try:
            with contextlib.suppress(BrokenPipeError):
                _write(self._input, {**request, "conversations": [list(map(dict, messages)) for messages in part]})
            for index, messages in enumerate(part):
                # A character is at most 12 bytes of JSON; places take some more.
                answer = _read(self._output, 32 * _allowed(messages))
                if answer is None:
                    raise TemplateError(start + index, self._why(messages))
                left -= 1
                if isinstance(answer, str):
                    raise TemplateError(start + index, answer)
                text, spans = answer
                yield text, [(first, last) for first, last in spans]
        finally:
            if left:  # answers to this request may still come
                self.close()

    def _why(self, messages: Conversation) -> str:
        """Why no answer came."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(1) == -signal.SIGXCPU:
                return f"it takes more than {_seconds(messages)} seconds"
        return "the process that renders it ended or answered too much"

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._input, self._output):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()


_lock = threading.RLock()
_current: list[_Worker] = []


def _worker() -> _Worker:
    if not (_current and _current[0].usable):
        close()
        _current.append(_Worker())
    return _current[0]


@atexit.register
def close() -> None:
    """Ends the worker, if there is one; the next template starts another."""
    while _current:
        _current.pop().close()


def _seconds(messages: Conversation) -> int:
    return SECONDS + _size(messages) // SECOND


def _allowed(messages: Conversation) -> int:
    return LONGEST + TIMES * _size(messages)


def _write(pipe: IO[bytes], value: Any) -> None:
    content = json.dumps(value).encode()
    pipe.write(len(content).to_bytes(_PREFIX, "little") + content)
    pipe.flush()


def _read(pipe: IO[bytes], most: int | None = None) -> Any:
    """The next value; `None` if there is none, or it has more than `most` bytes."""
    prefix = pipe.read(_PREFIX)
    size = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX or (most is not None and size > most):
        return None
    content = pipe.read(size)
    return json.loads(content) if len(content) == size else None


def _answer(request: Mapping[str, Any], messages: Conversation) -> Rendered | str:
    """A rendered conversation, or what is wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), spans = render_jinja_template(
            [messages],
            chat_template=request["template"],
            add_generation_prompt=request["ask"],
            return_assistant_tokens_mask=request["learned"],
            **request["variables"],
        )
        if len(text) > _allowed(messages):
            return f"it writes {len(text):,} characters; allowed here are {_allowed(messages):,}"
        return text, spans[0] if request["learned"] else []
    except MemoryError:
        return f"it needs more than {MEMORY // 2**20:,} MiB of memory"
    except Exception as error:  # a template runs any expression, which can fail in any way
        return " ".join(str(error)[:_MESSAGE].split()).rstrip(".") or type(error).__name__


def _limit(kind: int, value: int) -> None:
    """Sets a soft limit of this process, within the hard one, which stays."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _limit_memory() -> None:
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # Linux
        taken = int(statistics.read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, taken + MEMORY)


def _work(given: IO[bytes], said: IO[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when its input does
    try:
        from transformers.utils import chat_template_utils  # noqa: F401
    except Exception as error:
        _write(said, " ".join(str(error)[:_MESSAGE].split()) or type(error).__name__)
        return
    _limit(resource.RLIMIT_CORE, 0)
    _limit_memory()
    _write(said, True)
    while (request := _read(given)) is not None:
        for messages in request["conversations"]:
            # Whole seconds, of which the current one has begun.
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + _seconds(messages))
            _write(said, _answer(request, messages))
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 60)


if __name__ == "__main__":
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _work(sys.stdin.buffer, answers)
