"""Runs several configurations at once, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from jaxcl.config import ExperimentConfig
from jaxcl.config.file import dump_yaml
from jaxcl.data.files import open_end, write_text
from jaxcl.errors import UserError

_POLL_SECONDS = 0.1
_INTERRUPTED = 130


def run_jobs(configs: Mapping[str, ExperimentConfig], jobs: int, folder: Path) -> dict[str, str]:
    """Runs configurations, at most `jobs` at once. All of them are run, even if some fail.

    Args:
      configs: configurations by title, which is printed when a run starts.
      jobs: number of processes.
      folder: gets a configuration file and a log for each run.

    Returns:
      For each run that failed, by its title, the last line that it printed.

    Raises:
      UserError: a run refuses its configuration, as all others might; names its log.
      KeyboardInterrupt: interrupted, once the running ones have saved their state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(configs.items())[::-1]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                title, config = waiting.pop()
                print(f"{title}: {config.output}", flush=True)
                running[title] = _start(config, folder)
            time.sleep(_POLL_SECONDS)
            for title, process in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[title]
                    log = _log(configs[title], folder)
                    if code == _INTERRUPTED:
                        raise KeyboardInterrupt
                    if code:
                        failed[title] = _last_line(log)
                    if code == 2:
                        raise UserError(f"{title}: {failed[title]} ({log})", exit_code=2)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)  # a run saves its state
        for process in running.values():
            process.wait()
    return failed


def _start(config: ExperimentConfig, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / f"{Path(config.output).name}.yaml"
    write_text(path, dump_yaml(config.plain()))
    with open_end(_log(config, folder)) as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jaxcl", "run", str(path)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process, which sends a run one signal
        )


def _log(config: ExperimentConfig, folder: Path) -> Path:
    return folder / f"{Path(config.output).name}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "ended without a word"
