"""Signals to whole commands, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.devices import host_devices


def wait_for(event: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not event():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("which", "first", "second"),
    [
        pytest.param("checkpoint", signal.SIGTERM, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("checkpoint", signal.SIGINT, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("upload", signal.SIGUSR1, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_second_signal_ends_the_run_while_a_checkpoint_is_written_or_uploaded(
    which: str, first: signal.Signals, second: signal.Signals, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("slow_save_script.py")
    process = subprocess.Popen(
        [sys.executable, str(script), which, str(tmp_path)],
        env={**os.environ, **host_devices(1), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        (tmp_path / "told").touch()
        process.send_signal(first)
        wait_for((tmp_path / "waiting").exists, process)
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(second)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "jaxcl run: stopped at once; run the same command again to resume"


def test_a_second_signal_ends_a_command_whose_main_thread_does_not_come_back(tmp_path: Path) -> None:
    code = (
        "import re, sys, jaxcl.cli as cli\n"
        "import threading\n"
        "def hang(args):\n"
        "    word = 'up'\n"
        "    while True:\n"  # it waits again, as the end of a run does
        "        try:\n"
        "            print(word, flush=True)\n"
        "            threading.Event().wait()\n"
        "        except KeyboardInterrupt: word = 'first'\n"
        "cli._ACTIONS['show'] = hang\n"
        "sys.exit(cli.main(['show', 'run']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    time.sleep(0.5)  # it waits again
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "jaxcl show: stopped at once\n")
