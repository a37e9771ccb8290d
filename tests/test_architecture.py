"""Imports run one way, as CONTRIBUTING.md says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxcl"
LOOSE = {"__init__", "__main__", "cli", "errors", "gguf_header", "schema"}
EVERYWHERE = {"errors", "gguf_header", "schema", "__version__"}
MAY_IMPORT: dict[str, set[str]] = {
    "functional": set(),
    "models": {"functional"},
    "weights": {"models"},
    "methods": {"functional", "models"},
    "data": set(),
    "sharding": set(),
    "training": {"functional", "models", "methods", "data", "sharding"},
    "evaluation": {"functional", "models", "data"},
    "reporting": set(),
}
_PARTS = {*MAY_IMPORT}
for _upper in ("config", "run", "commands"):
    MAY_IMPORT[_upper] = {*_PARTS}
    _PARTS.add(_upper)
MAY_IMPORT["planning"] = {*_PARTS} - {"commands"}
MAY_IMPORT["flower"] = {*_PARTS} - {"commands"}
# What reads compiled programs knows nothing of runs.
ALONE = {"planning": {"step", "cost", "hlo", "hardware"}}
# `functional` serves programs that use nothing else of jaxcl.
FUNCTIONAL_NEEDS = {"jax", "jaxtyping", "numpy", "optax", "jaxcl"}


def imported(path: Path) -> set[str]:
    """Everything that a file imports, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    """The first component below `jaxcl` of everything that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("jaxcl.")}


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_the_table_allows(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert len(files) > 1
    for path in files:
        foreign = imported_parts(path) - MAY_IMPORT[folder] - EVERYWHERE - {folder}
        assert not foreign, f"{path.relative_to(PACKAGE)} imports {sorted(foreign)}"


def test_every_module_stands_in_the_table() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))} == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def test_contributing_has_the_same_table() -> None:
    lines = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`/") for row in rows] == list(MAY_IMPORT)
    for folder, _, allowed in rows:
        name = folder.strip("`/")
        if "above" not in allowed:
            assert {part.strip(" `") for part in allowed.split(",")} - {"nothing of jaxcl"} == MAY_IMPORT[name], name


@pytest.mark.parametrize(("folder", "names"), ALONE.items())
def test_some_modules_import_nothing_but_each_other(folder: str, names: set[str]) -> None:
    for name in names:
        inner = {one for one in imported(PACKAGE / folder / f"{name}.py") if one.startswith("jaxcl.")}
        others = {one for one in inner if one.split(".")[1] not in EVERYWHERE}
        assert all(one.split(".")[1:3] in [[folder, known] for known in names] for one in others), (name, others)


def test_there_are_no_circles() -> None:
    files = {_dotted(path): path for path in PACKAGE.rglob("*.py")}
    edges = {name: {_module(one, files) for one in imported(path)} - {None, name} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(str(target), (*way, name))
            done.add(name)

    for name in files:
        visit(name, ())


def _dotted(path: Path) -> str:
    """The module's name."""
    return ".".join(("jaxcl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _module(name: str, files: dict[str, Path]) -> str | None:
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def test_functional_needs_little() -> None:
    standard = sys.stdlib_module_names
    for path in (PACKAGE / "functional").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots - standard <= FUNCTIONAL_NEEDS, path.name


def test_functional_loads_no_framework() -> None:
    heavy = ["flax", "pydantic", "transformers", "orbax", "grain", "tensorflow_datasets", "matplotlib"]
    code = f"import sys, jaxcl.functional; sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_method_loads_no_other() -> None:
    from jaxcl.methods import METHODS

    code = (
        "import sys, jaxcl.methods as m; m.find_method('das'); print(*(n for n in sys.modules if 'jaxcl.methods' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split()) & {target.partition(":")[0] for target in METHODS.values()}
    assert loaded == {"jaxcl.methods.das"}


def test_methods_do_not_import_each_other() -> None:
    from jaxcl.methods import METHODS

    modules = {target.partition(":")[0] for target in METHODS.values()}
    for module in modules:
        path = PACKAGE / "methods" / f"{module.rpartition('.')[2]}.py"
        others = {one for name in imported(path) for one in modules - {module} if f"{name}.".startswith(f"{one}.")}
        assert not others, path.name


def test_data_and_command_line_import_no_jax() -> None:
    code = "import sys, jaxcl.cli, jaxcl.data.sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
