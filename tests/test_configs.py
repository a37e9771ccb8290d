"""Every shipped configuration is valid, and its real step can be lowered at its real size."""

import re
from pathlib import Path
from typing import Any

import pytest

from jaxcl.config import load_config
from jaxcl.data.sources import expected_kind
from jaxcl.evaluation.config import EvaluationConfig
from jaxcl.planning.plan import Program, programs
from jaxcl.sharding.mesh import make_mesh

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# SmolLM2's sizes, which that configuration reads from a package that need not be installed.
SMOLLM2 = [
    "model={architecture: llama, vocab_size: 49152, hidden_size: 576, intermediate_size: 1536, num_layers: 30, "
    "num_heads: 9, num_kv_heads: 3, max_length: 8192, rope_theta: 100000, tie_embeddings: true}"
]


def load(path: Path) -> Any:
    return load_config(path, SMOLLM2 if "smollm2" in path.name else [])


def programs_of(path: Path) -> dict[str, Program]:
    config = load(path)
    return programs(config, make_mesh(config.mesh))


def test_there_are_the_papers_settings_and_the_quickstarts() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "quickstart_seekr",
        "quickstart_das",
        "quickstart_federated",
        "quickstart_vision",
        "seekr_smollm2_superni",
        "das_roberta_base",
        "seekr_llama2_7b_trace",
        "seekr_llama2_7b_trace_order2",
        "seekr_llama2_7b_superni",
        "seekr_llama2_7b_superni_order2",
    }


# As TRACE publishes them; choices are judged by their letter, code with its literals put in.
TRACE_METRICS = {
    "C-STANCE": "choice_accuracy",
    "FOMC": "choice_accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "choice_accuracy",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "sari",
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("benchmark", ["trace", "superni"])
# Of tensorflow-datasets and what it imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_benchmarks_are_learned_in_their_published_orders_by_their_metrics(benchmark: str, order: int) -> None:
    from jaxcl.data.builders.instructions import SUPERNI_ORDERS, TRACE_ORDERS

    suffix = "" if order == 1 else "_order2"
    config = load(CONFIGS[0].with_name(f"seekr_llama2_7b_{benchmark}{suffix}.yaml"))
    names = {"trace": TRACE_ORDERS, "superni": SUPERNI_ORDERS}[benchmark][order - 1]
    assert tuple(task.name for task in config.tasks) == names
    assert [task.source for task in config.tasks] == [f"json:{name}" for name in names]
    metrics = [TRACE_METRICS[name] if benchmark == "trace" else "rouge_l" for name in names]
    assert [task.metric for task in config.tasks] == metrics


# Of tensorflow-datasets and what it imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_das_reads_data_sets_that_exist() -> None:
    from jaxcl.data.builders.prepare import BUILDERS

    for task in load(CONFIGS[0].with_name("das_roberta_base.yaml")).tasks:
        assert task.source == f"tfds:das_{task.name}"
        name, config = task.end_task.source.removeprefix("tfds:").split("/")
        assert config in {known.name for known in BUILDERS[name].BUILDER_CONFIGS}
        assert task.end_task.pair_field == ("aspect" if BUILDERS[name].domain.aspect else None)  # type: ignore[attr-defined]
        assert task.end_task.metric == ("micro_f1" if task.name == "pubmed" else "macro_f1")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_command_needs_and_hardware(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("jaxcl run" in line or "jaxcl federate" in line for line in header)
    load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_task_has_a_metric_that_exists(path: Path) -> None:
    config = load(path)
    evaluation: EvaluationConfig = config.evaluation
    for task in config.tasks:
        assert evaluation.metric_for(expected_kind(task), task.metric)


def one_of_each_step() -> list[Path]:
    """The configurations without those whose step another one has: a benchmark's second order."""
    paths: dict[str, Path] = {}
    for path in CONFIGS:
        plain = load(path).plain()
        step = [plain[section] for section in ("model", "method", "data", "mesh", "optimizer")]
        paths.setdefault(repr([*step, len(plain["tasks"])]), path)
    return list(paths.values())


@pytest.mark.parametrize("path", one_of_each_step(), ids=lambda path: path.stem)
def test_both_kinds_of_step_lower(path: Path) -> None:
    found = programs_of(path)
    assert ("replay" in found) == ("das" not in path.stem)
    for name in found.keys() & {"train", "replay"}:
        found[name].lower()


# Tokens of a row and scored ones, in every row of a batch; none: all are scored.
SHAPES = {
    "das_roberta_base": (164, 25),  # 15% of 164 are masked
    "quickstart_das": (96, None),
    "quickstart_federated": (80, 16),
    "quickstart_seekr": (80, 16),
    "quickstart_vision": (36, 8),
    "seekr_llama2_7b_superni": (1536, 512),
    "seekr_llama2_7b_trace": (1536, 512),
    "seekr_smollm2_superni": (448, 64),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_is_planned_for_the_rows_that_its_tasks_have(path: Path) -> None:
    config, found = load(path), programs_of(path)
    length, predict = SHAPES[path.stem.removesuffix("_order2")]
    batch = found["train"].arguments["batch"]
    assert batch.tokens.shape == (config.training.batch_size, length)
    assert batch.targets.shape == batch.weights.shape == (config.training.batch_size, predict or length)
    assert (batch.predict is None) == (predict is None)
    assert ("generate" in found) == ("das" not in path.stem)


@pytest.mark.parametrize(
    ("name", "step", "scopes"),
    [
        ("quickstart_das", "train", {"attention", "mlp", "logits", "pull"}),
        ("quickstart_seekr", "replay", {"attention", "mlp", "logits", "probe", "probe/distil", "distil"}),
    ],
)
def test_parts_of_a_step_have_their_names_in_a_trace(name: str, step: str, scopes: set[str]) -> None:
    text = programs_of(CONFIGS[0].with_name(f"{name}.yaml"))[step].lower().as_text(debug_info=True)
    places = {place.replace("checkpoint/", "") for place in re.findall(r'loc\("([^"]*)"', text)}
    for scope in scopes | {"loss", "optimizer", "metrics", "embed"}:
        # An operation carries the scopes around it, those of the backward pass within transpose(jvp(...)).
        assert any(re.search(rf"(^|/|\(){scope}\)*/", place) for place in places), f"{scope} in {sorted(places)[:40]}"


def test_measuring_importance_has_its_name_in_a_trace() -> None:
    measure = programs_of(CONFIGS[0].with_name("quickstart_das.yaml"))["importance"]
    assert '"jit(measure)/importance/' in measure.lower().as_text(debug_info=True)
