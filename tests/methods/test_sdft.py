"""Self-distillation against explicit rows that go through the network one at a time, and runs of it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.methods.passes.losses import language_model_terms
from jaxcl.methods.sdft import Sdft, SdftOptions
from jaxcl.models.batch import Batch
from jaxcl.models.images import NO_IMAGE, Images
from jaxcl.models.network import Network
from jaxcl.models.trainable import trained
from tests.tiny.batches import StandInTask, batch_of, make_pairs, pad_batch, take_rows
from tests.tiny.faults import killed_at_save
from tests.tiny.networks import VOCAB, init, log_softmax, named, perturbed, tiny_llama, tiny_roberta
from tests.tiny.runs import PAIRS, TEXT, numbers, run, stored
from tests.tiny.seeing import IMAGE_TOKENS, seeing

# Prompts of 4, 1 and 2 tokens, answers of 2, 4 and 3 with their end tokens, and a row that fills the batch.
SIZES = ((4, 2), (1, 4), (2, 3), (0, 0))
BATCH = make_pairs(SIZES)
WINDOWED = {"layer_types": ("window", "full"), "window": 3}
NETWORK = tiny_llama()
KEY = jax.random.key(3)
END = 1


def method_of(network: Network = NETWORK, **options: Any) -> Sdft:
    return Sdft(SdftOptions(**options), network, 2)


def taught_by(method: Sdft, teacher: Any) -> Any:
    return method.prepare(teacher, method.init(teacher), StandInTask([], index=0))


def texts(batch: Batch = BATCH, sizes: Any = SIZES) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row."""
    rows = np.asarray(batch.tokens).tolist()
    return [(row[:prompt], row[prompt : prompt + answer]) for row, (prompt, answer) in zip(rows, sizes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _scores(network: Network, params: Any, batch: Batch) -> Any:
    return network.logits(params, network.hidden(params, batch).states)[0]


def scores_of(network: Network, params: Any, text: list[int], images: Images | None = None) -> np.ndarray:
    """Scores of the next token at each place of one text: one row, no padding."""
    batch = batch_of([[1] * len(text)], np.array([text]), packed=False, images=images)
    return np.asarray(_scores(network, params, batch))


def brute_force(network: Network, student: Any, teacher: Any, rows: Any) -> tuple[float, int]:
    """Sum of the divergences over the tokens of all answers, and their number; `rows` of prompt, shown and answer."""
    total, count = 0.0, 0
    for prompt, shown, answer in rows:
        if answer:
            at = slice(-len(answer) - 1, -1)  # what predicts the answer
            known = log_softmax(scores_of(network, teacher, [*prompt, *shown, *prompt, *answer])[at])
            own = log_softmax(scores_of(network, student, [*prompt, *answer])[at])
            total, count = total + float(np.sum(np.exp(known) * (known - own))), count + len(answer)
    return total, count


def loss_of(method: Sdft, params: Any, teacher: Any, batch: Batch = BATCH) -> Any:
    return jax.jit(method.loss)(params, taught_by(method, teacher), batch, KEY)["loss"]


def written_by(method: Sdft, params: Any, batch: Batch = BATCH, key: Any = KEY) -> list[list[int]]:
    """The tokens of each row's answer."""
    answers, weights = jax.jit(method.answers)(params, batch, key)
    return [row[: int(count)].tolist() for row, count in zip(np.asarray(answers), np.sum(weights, 1), strict=True)]


@pytest.mark.parametrize("model", [{}, WINDOWED], ids=["full", "window"])
def test_the_loss_of_given_rows_is_the_formula(model: dict[str, Any]) -> None:
    network = tiny_llama(**model)
    params, teacher = init(network), perturbed(init(network), 0.2)
    rows = [(prompt, answer, answer) for prompt, answer in texts()]
    total, count = brute_force(network, params, teacher, rows)
    found = loss_of(method_of(network, rows="given"), params, teacher)
    assert count == found.count == 9
    assert found.weight == 1.0
    assert total > 1.0
    np.testing.assert_allclose(found.sum, total, rtol=1e-5)


def test_the_loss_of_written_rows_is_the_formula() -> None:
    params, teacher = init(NETWORK), perturbed(init(NETWORK), 0.2)
    method = method_of()
    draw_key = jax.random.split(KEY)[1]
    written = written_by(method, params, key=draw_key)
    assert [len(row) > 0 for row in written] == [True, True, True, False]
    rows = [(prompt, shown, answer) for (prompt, shown), answer in zip(texts(), written, strict=True)]
    total, count = brute_force(NETWORK, params, teacher, rows)
    found = loss_of(method, params, teacher)
    assert found.count == count
    np.testing.assert_allclose(found.sum, total, rtol=1e-5)


def likeliest(params: Any, prompt: list[int], most: int, end: int = END) -> list[int]:
    """The likeliest answer by full forward passes, up to its end token."""
    answer: list[int] = []
    while len(answer) < most and end not in answer:
        answer.append(int(np.argmax(scores_of(NETWORK, params, [*prompt, *answer])[-1])))
    return answer


def test_at_a_low_temperature_the_likeliest_tokens_are_written() -> None:
    params, method = init(NETWORK, 2), method_of(temperature=1e-4)
    free = [likeliest(params, prompt, 4) if prompt else [] for prompt, _ in texts()]
    assert {len(answer) for answer in free} == {4, 0}
    assert written_by(method, params) == free
    # Of a batch whose rows end, each with a token of its own, that is written on the way.
    ends = [free[0][2], free[1][1], free[2][0]]
    targets = np.asarray(BATCH.targets).copy()
    for row, (_, answer) in enumerate(SIZES[:3]):
        targets[row, answer - 1] = ends[row]
    expected = [likeliest(params, prompt, 4, end) for (prompt, _), end in zip(texts(), ends, strict=False)] + [[]]
    assert all(len(answer) < 4 for answer in expected)
    assert len(set(ends)) > 1
    assert written_by(method, params, dataclasses.replace(BATCH, targets=jnp.asarray(targets))) == expected


def test_tokens_behind_the_end_token_do_not_count() -> None:
    """The student has hardly learned anything, so that one token in thirteen is the end."""
    params, teacher = init(NETWORK), perturbed(init(NETWORK), 0.2)
    params["head"]["kernel"] *= 1e-3
    method, state = method_of(), taught_by(method_of(), teacher)
    lengths = set()
    for key in jax.random.split(KEY, 12):
        written = written_by(method, params, key=jax.random.split(key)[1])
        rows = [(prompt, shown, answer) for (prompt, shown), answer in zip(texts(), written, strict=True)]
        assert all((END in answer) == (answer[-1] == END) for answer in written[:3])
        assert all(answer[-1] == END for answer in written[:3] if len(answer) < 4)
        total, count = brute_force(NETWORK, params, teacher, rows)
        found = jax.jit(method.loss)(params, state, BATCH, key)["loss"]
        assert found.count == count
        np.testing.assert_allclose(found.sum, total, rtol=1e-5)
        lengths |= {len(answer) for answer in written}
    assert lengths == {0, 1, 2, 3, 4}


def test_draws_follow_the_softmax_of_the_student() -> None:
    params, count, temperature = init(NETWORK), 3000, 1.7
    batch = take_rows(BATCH, [0] * count)
    batch = dataclasses.replace(batch, example=jnp.arange(count, dtype=jnp.int32))
    answers, _ = jax.jit(method_of(temperature=temperature).answers)(params, batch, KEY)
    probs = np.exp(log_softmax(scores_of(NETWORK, params, texts()[0][0])[-1] / temperature))
    seen = np.bincount(np.asarray(answers[:, 0]), minlength=VOCAB) / count
    # Five standard deviations of each frequency.
    assert np.all(np.abs(seen - probs) < 5 * np.sqrt(probs * (1 - probs) / count) + 1e-9)
    assert probs.max() < 0.9


def test_what_a_row_writes_depends_on_no_other() -> None:
    params, method = init(NETWORK), method_of()
    together = written_by(method, params)
    assert [written_by(method, params, take_rows(BATCH, [row]))[0] for row in range(4)] == together
    assert written_by(method, params, pad_batch(BATCH, rows=1, length=2)) == [*together, []]
    assert written_by(method, params, key=jax.random.key(4)) != together


def test_no_gradient_flows_through_the_teacher() -> None:
    """The gradient is that of cross-entropy with the teacher's distribution, a constant even if student and teacher are
    the same params, where the gradient through both would vanish."""
    params, method = perturbed(init(NETWORK), 0.1), method_of(rows="given")
    state = taught_by(method, params)
    answers = texts()[:3]
    known = [
        np.exp(log_softmax(scores_of(NETWORK, params, [*prompt, *shown, *prompt, *shown])))[-len(shown) - 1 : -1]
        for prompt, shown in answers
    ]

    def cross_entropy(params: Any) -> Any:
        total = 0.0
        for (prompt, shown), probs in zip(answers, known, strict=True):
            batch = batch_of([[1] * (len(prompt) + len(shown))], np.array([[*prompt, *shown]]), packed=False)
            logits = NETWORK.logits(params, NETWORK.hidden(params, batch).states)[0, len(prompt) - 1 : -1]
            total -= jnp.sum(probs * jax.nn.log_softmax(logits))
        return total

    found = named(jax.jit(jax.grad(lambda params: method.loss(params, state, BATCH, KEY)["loss"].sum))(params))
    expected = named(jax.jit(jax.grad(cross_entropy))(params))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)
    assert max(float(abs(leaf).max()) for leaf in expected.values()) > 0.01


def test_no_gradient_flows_through_what_is_written() -> None:
    """It is that for the same answers, given."""
    params, method = init(NETWORK), method_of()
    state = taught_by(method, perturbed(params, 0.2))
    answers, weights = jax.jit(method.answers)(params, BATCH, jax.random.split(KEY)[1])
    fixed = dataclasses.replace(BATCH, targets=answers, weights=weights)

    def slope(method: Sdft, batch: Batch) -> Any:
        return jax.jit(jax.grad(lambda params: method.loss(params, state, batch, KEY)["loss"].sum))(params)

    found, expected = slope(method, BATCH), slope(method_of(rows="given"), fixed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize("rows", ["given", "written"])
def test_of_a_network_with_adapters_the_teacher_keeps_them_alone(rows: str) -> None:
    """It computes with the student's frozen params; and no gradient reaches it."""
    network = tiny_llama(num_layers=1, lora={"rank": 2, "alpha": 3.0, "targets": ["query", "up"]})
    params, method = perturbed(init(network), 0.2), method_of(network, rows=rows)
    teacher = perturbed(params, 0.2, 5)
    state = taught_by(method, teacher)
    assert named(state["teacher"]).keys() == named(trained(params)).keys()
    assert all("lora" in name for name in named(state["teacher"]))
    slopes = jax.jit(jax.grad(lambda state: method.loss(params, state, BATCH, KEY)["loss"].sum))(state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slopes))
    if rows == "given":
        mixed = jax.tree_util.tree_map_with_path(
            lambda path, own, kept: kept if "lora" in jax.tree_util.keystr(path) else own, params, teacher
        )
        total, _ = brute_force(network, params, mixed, [(prompt, answer, answer) for prompt, answer in texts()])
        found = jax.jit(method.loss)(params, state, BATCH, KEY)["loss"]
        np.testing.assert_allclose(found.sum, total, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.25, 0.0, 1.0])
def test_the_teacher_is_an_average_of_the_students(rate: float) -> None:
    method = method_of(teacher_rate=rate)
    start = init(NETWORK)
    students = [perturbed(start, 0.1, seed) for seed in range(3)]
    state = taught_by(method, start)
    expected = {name: np.asarray(leaf, np.float64) for name, leaf in named(start).items()}
    for before, after in zip([start, *students], students, strict=False):
        state = jax.jit(method.track)(after, state, before, before, {})
        for name, leaf in named(after).items():
            expected[name] = rate * np.asarray(leaf, np.float64) + (1 - rate) * expected[name]
    for name, leaf in named(state["teacher"]).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    # A new task has a new teacher.
    again = method.prepare(students[0], state, StandInTask([], index=1))
    jax.tree.map(np.testing.assert_array_equal, again["teacher"], students[0])


def test_the_teacher_of_a_bfloat16_model_moves_by_less_than_bfloat16_resolves() -> None:
    network = tiny_llama(num_layers=1, compute={"param_dtype": "bfloat16"})
    params, method = init(network), method_of(network, rows="given")
    state = taught_by(method, params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 1.01, params)
    for _ in range(2):
        state = method.track(wide, state, wide, wide, {})
    for name, leaf in named(state["teacher"]).items():
        start = np.asarray(named(params)[name], np.float64)
        np.testing.assert_allclose(leaf, start * (1 + 0.01 * (1 - 0.99**2)), rtol=1e-6, err_msg=name)
    assert np.isfinite(jax.jit(method.loss)(params, state, BATCH, KEY)["loss"].sum)


def test_padding_and_chunks_change_nothing() -> None:
    params, teacher = init(NETWORK), perturbed(init(NETWORK), 0.2)
    for rows in ("given", "written"):
        whole, parts = (method_of(rows=rows, loss_chunk=chunk) for chunk in (0, 1))
        expected = loss_of(whole, params, teacher)
        # A longer `predict` would let the student write more.
        more = {"predict": 1} if rows == "given" else {}
        padded = loss_of(parts, params, teacher, pad_batch(BATCH, rows=1, length=2, **more))
        np.testing.assert_allclose(padded.sum, expected.sum, rtol=1e-5)
        assert padded.count == expected.count


def test_general_rows_are_learned_as_by_plain_training() -> None:
    params, method = init(NETWORK), method_of()
    batch = dataclasses.replace(BATCH, origin="general")
    state = taught_by(method, perturbed(params, 0.2))
    found = jax.jit(method.loss)(params, state, batch, KEY)
    expected = language_model_terms(NETWORK, params, batch, KEY, 0)
    np.testing.assert_allclose(found["loss"].sum, expected["loss"].sum, rtol=1e-5)
    text = batch_of([[1, 1, 1]], origin="general")
    assert jax.eval_shape(method.loss, params, state, text, KEY).keys() == {"loss"}
    with pytest.raises(ValueError, match=r"batch\.predict: sdft expected rows of a prompt and an answer, got text"):
        method.loss(params, state, batch_of([[1, 1, 1]]), KEY)


def test_both_copies_of_a_prompt_show_its_image() -> None:
    network = seeing(num_layers=1)
    prompt, answer = 2 + IMAGE_TOKENS, 3
    batch = make_pairs([(prompt, answer)], length=prompt + answer + 2)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8, 8, 3)), jnp.float32)
    index = np.full((1, prompt + answer + 2), NO_IMAGE, np.int32)
    index[0, 1 : 1 + IMAGE_TOKENS] = np.arange(IMAGE_TOKENS)
    batch = dataclasses.replace(batch, images=Images(pixels, jnp.asarray(index)))
    params, teacher = perturbed(init(network), 0.1), perturbed(init(network), 0.2)
    text, shown = texts(batch, [(prompt, answer)])[0]
    once, row = index[:, :prompt], index[:, : prompt + answer]
    twice, alone = (Images(pixels, jnp.asarray(np.hstack(parts))) for parts in ([row, row], [row]))
    known = log_softmax(scores_of(network, teacher, [*text, *shown, *text, *shown], twice)[-answer - 1 : -1])
    own = log_softmax(scores_of(network, params, [*text, *shown], alone)[-answer - 1 : -1])
    total = float(np.sum(np.exp(known) * (known - own)))
    np.testing.assert_allclose(loss_of(method_of(network, rows="given"), params, teacher, batch).sum, total, rtol=1e-5)
    without = loss_of(method_of(network, rows="given"), params, teacher, dataclasses.replace(batch, images=None))
    assert abs(float(without.sum) - total) > 1e-3
    method = method_of(network, temperature=1e-4)
    best = int(np.argmax(scores_of(network, params, text, Images(pixels, jnp.asarray(once)))[-1]))
    assert written_by(method, params, batch)[0][0] == best


@pytest.mark.parametrize(
    ("options", "network", "message"),
    [
        ({}, tiny_roberta(), "name: sdft needs a decoder"),
        ({"loss_gate": "entropy"}, NETWORK, "loss_gate: sdft compares distributions"),
    ],
)
def test_options_and_models_that_do_not_fit_are_refused(options: Any, network: Network, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sdft.check(SdftOptions(**options), network.config)


# ---------------------------------------------------------------- runs

# Weights so large that what comes before an answer makes a difference.
MODEL: dict[str, Any] = {**PAIRS["model"], "num_layers": 1, "init_std": 0.5, "max_length": 176}
CONTENT: dict[str, Any] = {**PAIRS, "model": MODEL}
METHOD = {"name": "sdft", "teacher_rate": 0.1}


@pytest.mark.parametrize("saves", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_with_the_same_bits(saves: int, tmp_path: Path) -> None:
    content = {**CONTENT, "evaluation": {**PAIRS["evaluation"], "limit": 2, "max_new_tokens": 24}}
    assert run(content, tmp_path / "whole", METHOD).finished
    with killed_at_save(saves):
        run(content, tmp_path / "killed", METHOD)
    run(content, tmp_path / "killed", METHOD)
    whole, resumed = (Results.read(tmp_path / name / "results.json") for name in ("whole", "killed"))
    assert (resumed.matrix, resumed.further) == (whole.matrix, whole.further)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    params, state = stored(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, stored(tmp_path / "killed"), (params, state))
    steps = numbers(tmp_path / "whole")
    assert len(steps) == 7
    assert all(row["loss"] > 0.01 for row in steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": TEXT["tasks"][1:]}, "method.name: sdft needs prompts and answers; task pydantic is text"),
        ({"data": {**PAIRS["data"], "pack_pairs": True}}, "data.pack_pairs: sdft takes one pair per row"),
        (
            {"model": {**MODEL, "max_length": 175}},
            "data.prompt_length + answer_length: sdft reads each row 2 times in one pass, and 176 tokens exceed the "
            "model's window, model.max_length=175",
        ),
    ],
)
def test_rows_that_cannot_be_read_twice_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run({**CONTENT, **changes}, tmp_path / "run", METHOD)
    assert message in str(caught.value)


def test_a_configuration_names_it() -> None:
    config = parse_config({**CONTENT, "output": "run", "method": {"name": "sdft", "rows": "given"}})
    assert config.plain()["method"]["rows"] == "given"
    with pytest.raises(UserError, match=r"method\.name: sdft needs a decoder"):
        parse_config({**TEXT, "output": "run", "method": "sdft"})
