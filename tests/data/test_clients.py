"""One data set over several clients."""

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.cache import Cache
from jaxcl.data.clients import dirichlet_clients, even_clients, owner_folders, task_of_client
from jaxcl.data.sources import TaskData, load_task
from jaxcl.data.spec import TaskSpec
from jaxcl.data.split import ListRows
from jaxcl.errors import UserError

LABELS = [f"label {number % 6}" for number in range(600)]


def table(found: np.ndarray, labels: list[str], clients: int) -> np.ndarray:
    """Rows of each label at each client."""
    names = sorted(set(labels))
    counts = np.zeros((len(names), clients), int)
    for client, label in zip(found, labels, strict=True):
        counts[names.index(label), client] += 1
    return counts


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 5))
def test_even_clients_differ_by_one_row_at_most(count: int, clients: int, seed: int) -> None:
    if clients > count:
        with pytest.raises(UserError, match=f"clients: {clients} is not within 1 to {count}"):
            even_clients(count, clients, seed=seed)
        return
    sizes = np.bincount(even_clients(count, clients, seed=seed), minlength=clients)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1


@given(
    st.lists(st.integers(0, 4), min_size=8, max_size=60),
    st.integers(1, 8),
    st.sampled_from([0.1, 1.0, 10.0, math.inf]),
    st.integers(0, 5),
)
def test_every_row_has_one_client_and_every_client_a_row(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    with contextlib.nullcontext() if alpha == math.inf else contextlib.suppress(UserError):
        found = dirichlet_clients(labels, clients, alpha=alpha, seed=seed)
        assert found.shape == (len(labels),)
        assert np.unique(found).tolist() == list(range(clients))
        assert (found == dirichlet_clients(labels, clients, alpha=alpha, seed=seed)).all()


def test_a_large_alpha_is_even() -> None:
    found = table(dirichlet_clients(LABELS, 4, alpha=math.inf, seed=0), LABELS, 4)
    assert (found == 25).all()
    close = table(dirichlet_clients(LABELS, 4, alpha=1e6, seed=0), LABELS, 4)
    assert np.abs(close - 25).max() <= 2
    # Of labels with fewer rows than clients, none gets more than its share either.
    rare = [str(number // 2) for number in range(30)]
    sizes = np.bincount(dirichlet_clients(rare, 4, alpha=math.inf, seed=0))
    assert sizes.max() - sizes.min() <= 1


def test_a_small_alpha_separates_labels() -> None:
    found = table(dirichlet_clients(LABELS, 3, alpha=1e-4, seed=0), LABELS, 3)
    assert (found.max(axis=1) == 100).all()


def test_between_them_labels_are_uneven_as_the_distribution_is() -> None:
    """The deviation of a share of Dirichlet(alpha) over K clients: sqrt((1/K) (1 - 1/K) / (K alpha + 1))."""
    labels = [str(number % 400) for number in range(40_000)]
    for alpha in (0.5, 5.0):
        shares = table(dirichlet_clients(labels, 4, alpha=alpha, seed=0), labels, 4) / 100
        expected = math.sqrt(0.25 * 0.75 / (4 * alpha + 1))
        np.testing.assert_allclose(shares.std(axis=0), expected, rtol=0.1)  # 400 draws: within about 4%
        np.testing.assert_allclose(shares.mean(axis=0), 0.25, atol=0.06)


def test_another_seed_deals_otherwise() -> None:
    for deal in (
        lambda seed: even_clients(100, 3, seed=seed),
        lambda seed: dirichlet_clients(LABELS, 3, alpha=1.0, seed=seed),
        lambda seed: dirichlet_clients(LABELS, 3, alpha=math.inf, seed=seed),  # other rows of each label
    ):
        assert (deal(0) == deal(0)).all()
        assert (deal(0) != deal(1)).any()


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha: 0 is not above 0"):
        dirichlet_clients(LABELS, 3, alpha=0, seed=0)
    with pytest.raises(UserError, match=r"alpha: with 1e-05, 2 labels are not enough for 3 clients"):
        dirichlet_clients(["a", "b"] * 30, 3, alpha=1e-5, seed=0)
    with pytest.raises(UserError, match=r"clients: 7 is not within 1 to 6"):
        dirichlet_clients(LABELS[:6], 7, alpha=1.0, seed=0)


ROWS = [{"prompt": f"question {number}", "answer": "yes" if number % 3 else "no"} for number in range(60)]


def a_task(kind: str = "pairs", mixed: tuple[TaskData, ...] = ()) -> TaskData:
    return TaskData("quiz", kind, ListRows(ROWS), ListRows(), ListRows(ROWS[:5]), mixed=mixed)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_clients_of_a_task_have_each_training_row_once(alpha: float | None) -> None:
    parts = [task_of_client(a_task(), client, 4, alpha=alpha, seed=3) for client in range(4)]
    assert sorted(row["prompt"] for part in parts for row in part.train) == sorted(row["prompt"] for row in ROWS)
    assert all(part.test == ListRows(ROWS[:5]) for part in parts)
    assert all(part.name == "quiz" for part in parts)
    assert len({part.train.fingerprint["ordered"] for part in parts}) == 4
    whole = a_task()
    assert task_of_client(whole, 0, 1, alpha=alpha, seed=3) is whole


def test_labels_are_the_answers() -> None:
    parts = [task_of_client(a_task(), client, 2, alpha=1e-4, seed=0) for client in range(2)]
    assert [len({row["answer"] for row in part.train}) for part in parts] == [1, 1]


def test_streamed_rows_are_divided_as_those_in_memory(tmp_path: Path) -> None:
    text = "\n".join(f"A line of text, number {number}." for number in range(40))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "test.txt").write_text("Another line.")
    spec = TaskSpec(name="lines", source=f"text:{tmp_path}")
    cache = Cache(str(tmp_path / "cache"))
    for client in range(3):
        streamed = task_of_client(load_task(spec, cache=cache), client, 3, seed=1, cache=cache)
        in_memory = task_of_client(load_task(spec), client, 3, seed=1)
        assert list(streamed.train) == list(in_memory.train)
        assert streamed.train.fingerprint == in_memory.train.fingerprint


def test_tasks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="task quiz: alpha divides rows by their answers, and text has none"):
        task_of_client(a_task("text"), 0, 2, alpha=1.0, seed=0)
    with pytest.raises(UserError, match="task quiz: a mixture cannot be divided"):
        task_of_client(a_task(mixed=(a_task(),)), 0, 2, seed=0)


def test_owners_are_folders(tmp_path: Path) -> None:
    for name in ("west", "east", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("not a client")
    assert [path.name for path in owner_folders(tmp_path)] == ["east", "west"]
    with pytest.raises(UserError, match="expected a folder per client, found none"):
        owner_folders(tmp_path / "east")
    with pytest.raises(UserError, match="there is no such folder"):
        owner_folders(tmp_path / "north")
