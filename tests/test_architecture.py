"""Imports run one way, as CONTRIBUTING.md says."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxcl"
EVERYWHERE = {"errors", "schema", "__version__"}
MAY_IMPORT: dict[str, set[str]] = {
    "models": set(),
    "weights": {"models"},
    "methods": {"models"},
    "data": set(),
    "sharding": set(),
    "training": {"models", "methods", "data", "sharding"},
    "evaluation": {"models", "data"},
    "reporting": set(),
}


def imported_parts(path: Path) -> set[str]:
    """The first component below `jaxcl` of everything a file imports."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("jaxcl.")}
    return parts


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_the_table_allows(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert len(files) > 1
    for path in files:
        foreign = imported_parts(path) - MAY_IMPORT[folder] - EVERYWHERE - {folder}
        assert not foreign, f"{path.relative_to(PACKAGE)} imports {sorted(foreign)}"


def test_every_folder_stands_in_the_table() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


def test_methods_do_not_import_each_other() -> None:
    from jaxcl.methods import METHODS

    files = {Path(PACKAGE / "methods" / f"{cls.__module__.rsplit('.', 1)[1]}.py"): cls for cls in METHODS.values()}
    names = {path.stem for path in files}
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {f"jaxcl.methods.{name}" for name in names - {path.stem}}
        assert not modules & others, path.name


def test_data_and_command_line_import_no_jax() -> None:
    import subprocess
    import sys

    code = "import sys, jaxcl.cli, jaxcl.data.sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
