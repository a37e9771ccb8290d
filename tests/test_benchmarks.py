"""Benchmarks are run by hand, so what they import from jaxcl is looked up here, wherever it is imported."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "jaxcl":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("jaxcl", "benchmarks"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if hasattr(module, "__path__"):  # a package, whose modules may not be loaded yet
                missing = [name for name in missing if find_spec(f"{node.module}.{name}") is None]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
