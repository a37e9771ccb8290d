"""What clients send over a network, read as bytes; Flower's own part is in `test_flower`."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import ExperimentConfig, parse_config
from jaxcl.errors import UserError
from jaxcl.flower.grid import FlowerGrid
from jaxcl.flower.join import Seat, open_seat
from jaxcl.flower.serve import run_on
from jaxcl.run.grid import Reply
from jaxcl.run.model import load_model
from jaxcl.run.wire import pack, tree_like, unpack
from tests.federated.helpers import DOMAINS, federated, rounds
from tests.tiny.networks import assert_equal_bits

SECTION: dict[str, Any] = {"clients": 2, "rounds": 3, "steps": 1}
CONTENT: dict[str, Any] = {**DOMAINS, "training": {**DOMAINS["training"], "checkpoint_every": 1}}
METHOD = {"name": "ewc"}  # shares the Fisher
FIRST = 100  # number of the first node

# Words of answers that are no arrays.
WORDS: dict[str, set[str]] = {
    "hello": {"client"},
    "begin": {"weight"},
    "save": {"checkpoint"},
    "describe": {"data", "skipped"},
}


def config(output: Path, **section: Any) -> ExperimentConfig:
    content = {**CONTENT, "output": str(output), "method": METHOD, "federated": {**SECTION, **section}}
    return parse_config(content)


class Loopback(FlowerGrid):
    """Clients in this process that get and give bytes; one of them may be gone for a while."""

    def __init__(self, seats: Sequence[Seat], *, clients: int | None = None) -> None:
        self.seats = list(seats)
        self.sent: list[tuple[str, bytes]] = []
        super().__init__(self, clients or len(seats), timeout=1.0, patience=0.0)

    def get_node_ids(self) -> list[int]:
        return [FIRST + number for number in range(len(self.seats))]

    def _send(self, contents: Mapping[int, bytes], what: str, timeout: float) -> dict[int, bytes | str]:
        found: dict[int, bytes | str] = {}
        for node, content in contents.items():
            answer = self.seats[node - FIRST].answer(content)
            self.sent.append((what, answer))
            found[node] = answer
        return found


@contextlib.contextmanager
def seats(folder: Path, **section: Any) -> Iterator[list[Seat]]:
    with contextlib.ExitStack() as stack:
        yield [open_seat(config(folder / f"client{number}", **section), number, stack) for number in (0, 1)]


def test_a_message_is_named_arrays_and_words() -> None:
    tree = {"params": {"a": np.arange(3, dtype=np.float32), "b": {"c": np.uint32(7)}}, "variate": np.ones((2, 0))}
    arrays, words = unpack(pack(tree, {"task": 1, "list": [1, None]}))
    assert words == {"task": 1, "list": [1, None]}
    assert_equal_bits(tree_like(arrays, tree), tree)
    assert tree_like(arrays, {"params": 0}).keys() == {"params/a", "params/b/c", "variate"}


@pytest.mark.parametrize("content", [b"", b"nonsense", pack({}, {})[:-30], pack({}, {}).replace(b"{}", b"[]")])
def test_what_is_not_a_message_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="a message cannot be read"):
        unpack(content)


def test_a_message_with_objects_is_refused() -> None:
    import io

    stored = io.BytesIO()
    np.savez(stored, words=np.array([print], dtype=object))
    with pytest.raises(UserError, match="a message cannot be read"):
        unpack(stored.getvalue())


def test_nothing_leaves_a_client_but_params_and_what_the_method_shares(tmp_path: Path) -> None:
    federated(CONTENT, tmp_path / "alone", METHOD, **SECTION)
    with seats(tmp_path) as found:
        grid = Loopback(found)
        run_on(grid, config(tmp_path / "server"))
    rows = rounds(tmp_path / "server")
    assert rows == rounds(tmp_path / "alone")
    assert [row["kind"] for row in rows] == ["shared", *["round"] * 3, "shared"] * 2
    params = load_model(str(tmp_path / "server")).params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert {(row["bytes_up"], row["bytes_down"]) for row in rows} == {(2 * size, 2 * size)}
    assert_equal_bits(params, load_model(str(tmp_path / "alone")).params)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
              for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
    trained = {f"params/{name}" for name in leaves}
    fisher = {f"fisher/{name}" for name in leaves}
    for what, content in grid.sent:
        arrays, words = unpack(content)
        assert set(arrays) == {"train": trained, "begin": fisher, "conclude": fisher}.get(what, set()), what
        assert set(words) == WORDS.get(what, set()), what
        # Nothing else is in the file: headers of arrays, names and words are all that the sizes leave room for.
        room = sum(array.nbytes + 300 + 2 * len(name) for name, array in arrays.items())
        assert len(content) <= room + len(json.dumps(words)) + 700
    assert {what for what, _ in grid.sent} == {
        "hello", "open", "begin", "train", "conclude", "merge", "store", "save", "describe", "close",
    }  # fmt: skip


def test_a_client_that_was_started_again_comes_back(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(seats(tmp_path))
        grid = Loopback(found)
        original = found[1].answer
        asked = 0

        def answer(content: bytes) -> bytes:
            nonlocal asked
            what = unpack(content)[1]["what"]
            asked += what == "train"
            if what == "train" and asked == 2:
                found[1].close()  # as a new process begins
            return original(content)

        found[1].answer = answer  # type: ignore[method-assign]
        run_on(grid, config(tmp_path / "server"))
    rows = [row for row in rounds(tmp_path / "server") if row["kind"] == "round"]
    assert [row["refused"] for row in rows] == [{}, {"1": "was started again"}, {}, {}, {}, {}]


def test_a_message_that_comes_twice_is_answered_once(tmp_path: Path) -> None:
    with seats(tmp_path, rounds=2) as found:
        grid = Loopback(found)
        send = grid._send

        def twice(contents: Mapping[int, bytes], what: str, timeout: float) -> dict[int, bytes | str]:
            first, second = send(contents, what, timeout), send(contents, what, timeout)
            assert first == second
            return second

        grid._send = twice  # type: ignore[method-assign]
        run_on(grid, config(tmp_path / "server", rounds=2))
    federated(CONTENT, tmp_path / "alone", METHOD, **{**SECTION, "rounds": 2})
    params = (load_model(str(tmp_path / folder)).params for folder in ("server", "alone"))
    assert_equal_bits(*params)


def test_a_client_with_another_configuration_is_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        other = config(tmp_path / "client1")
        model = other.model.model_copy(update={"hidden_size": 32})
        one = open_seat(config(tmp_path / "client0"), 0, stack)
        two = open_seat(other.model_copy(update={"model": model}), 1, stack)
        run_on(Loopback([one, two]), config(tmp_path / "server"))
    assert "client 1 is left out: model.hidden_size is 32, and at the server 16" in capsys.readouterr().err
    assert all(list(row["refused"]) == ["1"] for row in rounds(tmp_path / "server") if row["kind"] == "round")
    assert json.loads((tmp_path / "server" / "results.json").read_text())["finished"]


def test_who_joins_without_a_message_is_not_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    class Joins:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def answer(self, content: bytes) -> bytes:
            return self.content

    strangers: list[Any] = [Joins(b"nonsense"), Joins(pack({}, {"client": 7})), Joins(pack({}, {"client": 0}))]
    found = dict(Loopback(strangers, clients=2).ask("save", {0: {}, 1: {}}, {}))
    assert isinstance(found[0], Reply)
    assert found[1] == "is not connected"
    assert "clients 1 have not joined" in capsys.readouterr().err


def test_clients_agree_on_secrets(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    for folder, secure in (("plain", False), ("masked", True)):
        content = {**CONTENT, "method": "sequential", "federated": {**SECTION, "rounds": 2, "secure": secure}}
        with contextlib.ExitStack() as stack:
            places = [str(tmp_path / folder / f"client{number}") for number in (0, 1)]
            found = [open_seat(parse_config({**content, "output": out}), int(out[-1]), stack) for out in places]
            run_on(Loopback(found), parse_config({**content, "output": str(tmp_path / folder / "server")}))
    plain, masked = (load_model(str(tmp_path / folder / "server")).params for folder in ("plain", "masked"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), plain, masked)
    assert not any("lost" in row for row in rounds(tmp_path / "masked" / "server"))
