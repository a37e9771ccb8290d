"""One of two processes: starts up, lets process 0 do things, fails. Run as a program: SCENARIO FILE."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from jaxcl.errors import UserError
from jaxcl.sharding import processes


def together(file: Path) -> None:
    assert processes.initialize()  # the second call changes nothing
    processes.on_first(lambda: file.write_text("written"))
    assert file.read_text() == "written"  # by process 0, before any went on

    def refuse() -> None:
        raise UserError("no room: ä", exit_code=7)

    with pytest.raises(UserError, match=r"^no room: ä$") as caught:
        processes.on_first(refuse)
    assert caught.value.exit_code == 7
    first = processes.is_first()
    assert not processes.everywhere(first)
    assert processes.everywhere(True)

    def refuse_on_second() -> None:
        if not first:
            raise UserError("rows.jsonl line 7: ö", exit_code=5)

    with pytest.raises(UserError, match=r"^rows.jsonl line 7: ö$") as caught:
        processes.on_each(refuse_on_second)
    assert caught.value.exit_code == 5
    assert signal.getsignal(signal.SIGTERM) is handler
    signal.raise_signal(signal.SIGTERM)  # jax's runtime has not taken it
    assert came == [signal.SIGTERM]
    processes.wait_for_all("the end")
    if not processes.is_first():
        processes.leave(9)
    print("alone", flush=True)
    processes.leave(8)


came: list[int] = []


def handler(number: int, frame: object) -> None:
    came.append(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, handler)
    try:
        processes.initialize(timeout=60)
        together(Path(sys.argv[1]))
    except UserError as error:
        print(error, flush=True)
        processes.leave(error.exit_code)
