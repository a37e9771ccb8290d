"""Compiling takes most of the tests' time, and most of that goes into optimising programs that run once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings

from jaxcl.run import sequence
from tests.tiny.devices import FAST

# A program is compiled once for all tests, however small it is, where a folder for compiled programs is set, as
# `make test` does. What tests start as programs of their own reads the environment, and imports from `tests`.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).strip(
    os.pathsep
)
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# In the background of a script, SIGINT is ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Flags are read when the first program is compiled. The compiler for TPUs reads them again, and ends at this one.
with pytest.MonkeyPatch.context() as patched:
    patched.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip())
    jax.block_until_ready(jax.jit(lambda: 0)())


WHOLE_RUNS = Path(__file__).parent
LONG = {"test_same_numbers", "test_devices"}

# How long an example takes is the machine's affair.
settings.register_profile("jaxcl", deadline=None)
settings.load_profile("jaxcl")


@pytest.fixture(scope="module", autouse=True)
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without most optimisations, except in modules with `pytestmark = pytest.mark.optimised`."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimised") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised(optimisation: None) -> Iterator[None]:
    """Compiles with all optimisations in a test that reads a program of its own, and in no other of its module."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def no_reports() -> Iterator[None]:
    """Runs in the tests' own process write no report, which takes as long as the run; tests that read one write it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sequence, "write_report", lambda folder: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoded rows are kept in a folder of the tests, not in the user's."""
    os.environ["JAXCL_DATA_CACHE"] = str(tmp_path_factory.mktemp("data_cache"))


@pytest.fixture(autouse=True)
def own_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations of tests name their data; a folder in the user's environment would replace it."""
    monkeypatch.delenv("JAXCL_DATA", raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Modules that take long come first: with two workers, one of them at the end would leave the other waiting.
    items.sort(key=lambda item: item.path.parent != WHOLE_RUNS and item.path.stem not in LONG)
    for item in items:
        if any(mark.name == "optimised" for mark in item.own_markers):
            raise pytest.UsageError(f"{item.nodeid}: optimised is a mark of modules: fixtures compile for all tests")
