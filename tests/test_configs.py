"""Every shipped configuration is valid, and its real step can be lowered at its real size."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxcl.config import load_config
from jaxcl.data.plan import Shape
from jaxcl.evaluation.config import EvaluationConfig
from jaxcl.functional.importance import ImportanceSums
from jaxcl.methods import find_method
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.sharding.layout import Layout
from jaxcl.sharding.mesh import make_mesh
from jaxcl.training.stored import stored_shapes
from jaxcl.training.trainer import Trainer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# SmolLM2's sizes, which that configuration reads from a package that need not be installed.
SMOLLM2 = [
    "model={architecture: llama, vocab_size: 49152, hidden_size: 576, intermediate_size: 1536, num_layers: 30, "
    "num_heads: 9, num_kv_heads: 3, max_length: 8192, rope_theta: 100000, tie_embeddings: true}"
]


def load(path: Path) -> Any:
    return load_config(path, SMOLLM2 if "smollm2" in path.name else [])


def batch_shapes(rows: int, length: int, predict: int, **fields: Any) -> Batch:
    whole, scored, row = (jax.ShapeDtypeStruct(size, jnp.int32) for size in ((rows, length), (rows, predict), (rows,)))
    weights = jax.ShapeDtypeStruct((rows, predict), jnp.float32)
    return Batch(whole, whole, whole, scored, scored, weights, row, row, **fields)


def teacher_shapes(method: Any, target: Any, batch: Batch, shape: Shape) -> Any:
    """What the method's own signals look like once stored and collated, from shapes alone."""
    return stored_shapes(method, target.params, target.method_state, batch.size, shape) or None


def test_there_are_the_papers_settings_and_the_quickstarts() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "quickstart_seekr",
        "quickstart_das",
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
    assert any("jaxcl run" in line for line in header)
    load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_task_has_a_metric_that_exists(path: Path) -> None:
    config = load(path)
    evaluation: EvaluationConfig = config.evaluation
    for task in config.tasks:
        kind = (
            "text"
            if task.end_task is not None or task.source.startswith(("text:", "stdlib:docstrings", "stdlib:py"))
            else "pairs"
        )
        assert evaluation.metric_for(kind, task.metric)  # type: ignore[arg-type]


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
    config = load(path)
    network = Network.create(config.model)
    layout = Layout.create(make_mesh(config.mesh), network.axes(), network.shapes())
    method = config.method.build(network, len(config.tasks))
    trainer = Trainer(method, config.optimizer, layout, accumulate=1, seed=0)
    rows = 2
    if network.causal:
        shape = Shape(config.data.prompt_length + config.data.answer_length, config.data.answer_length)
    else:
        shape = Shape(config.data.length, round(config.data.length * config.data.mask_rate))
    length, predict = shape.length, shape.predict or 0
    batches = [batch_shapes(rows, length, predict)]
    if method.replay is not None:
        memory = batch_shapes(rows, length, predict, origin="memory")
        teacher = teacher_shapes(method, trainer.target, memory, shape)
        batches.append(batch_shapes(rows, length, predict, origin="memory", teacher=teacher))
    for batch in batches:
        lowered = trainer.jitted_step.lower(trainer.target, batch, trainer.key)
        # The layers are scanned: the program must not grow with depth.
        assert len(lowered.as_text()) < 5_000_000


@pytest.mark.parametrize(
    ("name", "kind", "scopes"),
    [
        ("quickstart_das", "task", {"attention", "mlp", "logits", "contrast", "soft_mask"}),
        ("quickstart_seekr", "memory", {"attention", "mlp", "logits", "probe", "probe/distil", "distil"}),
    ],
)
def test_parts_of_a_step_have_their_names_in_a_trace(name: str, kind: str, scopes: set[str]) -> None:
    config = load(CONFIGS[0].with_name(f"{name}.yaml"))
    network = Network.create(config.model)
    layout = Layout.create(make_mesh(config.mesh), network.axes(), network.shapes())
    method = config.method.build(network, len(config.tasks))
    trainer = Trainer(method, config.optimizer, layout, accumulate=1, seed=0)
    batch = batch_shapes(2, 64, 16, kind=kind)
    if kind == "memory":
        batch = batch_shapes(2, 64, 16, kind=kind, teacher=teacher_shapes(method, trainer.target, batch, Shape(64, 16)))
    text = trainer.jitted_step.lower(trainer.target, batch, trainer.key).as_text(debug_info=True)
    places = {place.replace("checkpoint/", "") for place in re.findall(r'loc\("([^"]*)"', text)}
    for scope in scopes | {"loss", "optimizer", "metrics", "embed"}:
        # An operation carries the scopes around it, those of the backward pass within transpose(jvp(...)).
        assert any(re.search(rf"(^|/|\(){scope}\)*/", place) for place in places), f"{scope} in {sorted(places)[:40]}"


def test_measuring_importance_has_its_name_in_a_trace() -> None:
    config = load(CONFIGS[0].with_name("quickstart_das.yaml"))
    network = Network.create(config.model)
    sums = jax.eval_shape(lambda: ImportanceSums.zero(network.gates()))
    method = find_method("das")(config.method.options, network, 3)
    lowered = jax.jit(method.add_domain).lower(sums, network.shapes(), batch_shapes(2, 64, 16), jax.random.key(0))
    assert '"jit(add_domain)/importance/' in lowered.as_text(debug_info=True)
