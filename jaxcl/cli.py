"""The `jaxcl` command. Heavy imports are deferred to the commands, so that `--help` is fast."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from jaxcl.commands.parser import EXIT_USAGE, build_parser
from jaxcl.data.formats.storage import is_url
from jaxcl.errors import UserError
from jaxcl.training.signals import second_ends

EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130
# Words of jax, Gloo and NCCL when a process that this one works with does not answer.
_LOSS = re.compile(r"gloo|nccl|unavailable|heartbeat|coordination|connection (closed|reset|refused)", re.IGNORECASE)
# Errors of jax that are this process's own.
_OWN = re.compile(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED")

_RESUMING = ("run", "extend", "compare", "federate", "serve", "join")  # commands that resume when they are run again


def _say(result: object) -> None:
    """Prints a result, on process 0 only."""
    from jaxcl.sharding.processes import is_first

    if is_first():
        print(result)


def _local(place: str) -> str:
    """The local folder of a run that is given by a path or a URL."""
    if not is_url(place):
        return place
    from jaxcl.run.remote.reading import local_copy

    return str(local_copy(place))


def _run(args: argparse.Namespace) -> None:
    from jaxcl.config import load_config
    from jaxcl.run.sequence import run

    _say(run(load_config(args.config, args.overrides), data_changed=args.data_changed).report)


def _federate(args: argparse.Namespace) -> None:
    from jaxcl.config import load_config
    from jaxcl.run.federation import federate

    _say(federate(load_config(args.config, args.overrides)).report)


def _serve(args: argparse.Namespace) -> None:
    from jaxcl.config import load_config
    from jaxcl.flower.serve import serve

    config = load_config(args.config, args.overrides)
    certificate, key = (path and Path(path) for path in (args.certificate, args.key))
    limits = {"timeout": args.timeout, "patience": args.patience}
    _say(serve(config, certificate=certificate, key=key, insecure=args.insecure, address=args.address, **limits))


def _join(args: argparse.Namespace) -> None:
    from jaxcl.config import load_config
    from jaxcl.flower.join import join

    certificate = args.certificate and Path(args.certificate)
    config = load_config(args.config, args.overrides)
    join(config, args.client, args.server, certificate=certificate, insecure=args.insecure, port=args.port)


def _extend(args: argparse.Namespace) -> None:
    from jaxcl.commands.extend import extend

    flags = {"data_gone": args.data_gone, "data_changed": args.data_changed, "trust": args.trust}
    _say(extend(Path(args.run), args.overrides, args.length, **flags).report)


def _importance(args: argparse.Namespace) -> None:
    from jaxcl.commands.importance import measure_importance

    out = None if args.out is None else Path(args.out)
    _say(measure_importance(args.config, args.overrides, out, trust=args.trust))


def _teacher(args: argparse.Namespace) -> None:
    from jaxcl.commands.teacher import describe_teacher

    _say(describe_teacher(Path(_local(args.run)), trust=args.trust))


def _compare(args: argparse.Namespace) -> None:
    from jaxcl.commands.compare import compare

    swept = [key for key, _ in args.sweep]
    if repeated := sorted({key for key in swept if swept.count(key) > 1}):
        raise UserError(f"--sweep {repeated[0]}: given twice; give all its values at once", exit_code=EXIT_USAGE)
    sweeps, out = dict(args.sweep), Path(args.out)
    _say(compare(args.config, args.overrides, args.methods, args.seeds, out, sweeps, args.jobs, args.budget))


def _plan(args: argparse.Namespace) -> None:
    # Plans are for other hardware: accelerators of this machine must not be used.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxcl.config import load_config
    from jaxcl.planning.plan import as_json, plan
    from jaxcl.planning.table import as_table

    overrides = [*args.overrides, *(f"mesh.{one.strip()}" for one in args.mesh.split(",") if one)]
    config = load_config(args.config, overrides)
    if args.search:
        from jaxcl.planning.search import search

        found = search(config, args.topology, args.search, args.tries, args.images)
    else:
        found = plan(config, args.topology, args.steps, args.images)
    print(as_json(found) if args.json else as_table(found))


def _convert(args: argparse.Namespace) -> None:
    from jaxcl.commands.convert import convert

    print(convert(_local(args.source), Path(args.destination), args.format, args.dtype, trust=args.trust))


def _generate(args: argparse.Namespace) -> None:
    from jaxcl.commands.generate import generate_text

    print(
        generate_text(
            _local(args.model),
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            raw=args.raw,
            task=args.task,
            images=args.image,
            trust=args.trust,
        )
    )


def _data(args: argparse.Namespace) -> None:
    # Only counts and texts: accelerators are for the run.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxcl.commands.data import describe_data, use_colour

    _say(describe_data(args.config, args.overrides, samples=args.samples, colour=use_colour()))


def _prepare(args: argparse.Namespace) -> None:
    from jaxcl.data.builders.prepare import prepare

    for prepared in prepare(args.names, Path(args.manual_dir), args.data_dir and Path(args.data_dir)):
        print(prepared.line())


def _report(args: argparse.Namespace) -> None:
    from jaxcl.reporting.rebuild import rebuild

    for folder in args.runs:
        print(rebuild(Path(_local(folder))))


def _show(args: argparse.Namespace) -> None:
    from jaxcl.commands.show import show

    with contextlib.ExitStack() as stack:
        folder, url = Path(args.run), None
        if is_url(args.run):
            from jaxcl.run.remote.reading import sketch

            folder, url = stack.enter_context(sketch(args.run)), args.run
        print(show(folder, url))
        if args.params:
            _show_params(folder, args.trust)


def _show_params(folder: Path, trust: bool) -> None:
    # The table is computed from shapes: no accelerator is needed, and a run may be using this one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxcl.commands.params_table import params_table

    print(f"\n{params_table(folder, trust=trust)}")


def _configs(args: argparse.Namespace) -> None:
    from jaxcl.commands.configs import copy_config, list_configs

    if args.copy is None:
        if args.destination is not None:
            raise UserError(f"{args.destination}: a destination needs --copy NAME", exit_code=EXIT_USAGE)
        print(list_configs())
    else:
        print(copy_config(args.copy, args.destination and Path(args.destination)))


_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": _run,
    "federate": _federate,
    "serve": _serve,
    "join": _join,
    "extend": _extend,
    "compare": _compare,
    "show": _show,
    "report": _report,
    "importance": _importance,
    "teacher": _teacher,
    "plan": _plan,
    "convert": _convert,
    "generate": _generate,
    "data": _data,
    "prepare": _prepare,
    "configs": _configs,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; unlike with argparse alone, `KEY=VALUE` may also follow options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; `None` takes those of the process.

    Returns:
      The exit code: 0 done, 1 failed, 2 bad usage or configuration, 75 another process of the run is gone, 130
      interrupted.
    """
    args = _parse(argv)
    # A scheduler's signals are handled like Ctrl-C: save and stop.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    code, alone = EXIT_FAILURE, True
    try:
        with second_ends(f"jaxcl {args.command}: stopped at once{_advice(args.command)}", EXIT_INTERRUPTED):
            code, alone = _act(args)
    finally:
        _leave_others(code if alone else 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


def _act(args: argparse.Namespace) -> tuple[int, bool]:
    """Runs a command: its exit code, and whether it failed without the other processes of the run knowing."""
    code = EXIT_FAILURE
    try:
        _ACTIONS[args.command](args)
        code = 0
    except UserError as error:
        print(f"jaxcl {args.command}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt as error:
        print(f"jaxcl {args.command}: interrupted{_advice(args.command)}", file=sys.stderr)
        return EXIT_INTERRUPTED, type(error) is KeyboardInterrupt
    except (RuntimeError, ValueError) as error:
        if not _is_loss(error):
            raise
        code = _await_verdict()
        words = next(iter(str(error).splitlines()), "no reason given")
        gone = f"another process of the run is gone: {words}{_advice(args.command)}"
        print(f"jaxcl {args.command}: {gone}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        print(f"jaxcl {args.command}: out of memory", file=sys.stderr)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"jaxcl {args.command}: {error.strerror or error}{where}", file=sys.stderr)
    return code, True


def _advice(command: str) -> str:
    return "; run the same command again to resume" if command in _RESUMING else ""


def _is_loss(error: RuntimeError | ValueError) -> bool:
    """Whether jax has failed in a run of several processes, as it does when another one has ended.

    What fails in a collective of Gloo is a ValueError.
    """
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    words = not _OWN.search(str(error)) if of_jax else bool(_LOSS.search(str(error)))
    return words and jax.process_count() > 1


def _await_verdict() -> int:
    """Leaves it to the watch to say which process is gone and end this one; otherwise the exit code for it."""
    from jaxcl.sharding.peers import EXIT_LOST
    from jaxcl.sharding.processes import await_verdict

    await_verdict()
    return EXIT_LOST


def _leave_others(code: int) -> None:
    """Ends this process if it failed alone and is one of several; 0: it did not, and is not to be missed."""
    processes = sys.modules.get("jaxcl.sharding.processes")
    if processes is not None:
        if code:
            processes.leave(code)
        else:
            processes.part()


if __name__ == "__main__":
    sys.exit(main())
