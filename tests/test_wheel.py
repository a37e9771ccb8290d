"""What is installed: the wheel holds what is needed and nothing else, and works outside the checkout."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxcl.config import shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what setuptools reads: building leaves folders in the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxcl", "tests", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Without an environment of its own for the build, which would be downloaded.
    build = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_configurations_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
        texts = {name: archive.read(f"jaxcl/config/shipped/{name}.yaml") for name in shipped()}
    assert texts == {name: path.read_bytes() for name, path in shipped().items()}
    assert Path("jaxcl/py.typed") in names
    assert {name.parts[0] for name in names} == {"jaxcl", f"jaxcl-{_version()}.dist-info"}
    modules = {path.relative_to(ROOT) for path in (ROOT / "jaxcl").rglob("*.py")}
    assert {name for name in names if name.suffix == ".py"} == modules


def _version() -> str:
    return importlib.metadata.version("jaxcl")


@pytest.mark.slow
def test_a_quickstart_runs_from_an_unrelated_folder_where_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "environment", tmp_path / "folder"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    # The dependencies are those of the environment at hand: to install them again would take minutes, and the test is
    # about jaxcl's own files. A folder named in a .pth file is searched, but the .pth files in it are not read, so that
    # the checkout, which is installed there as editable, cannot be imported.
    python = home / "bin" / "python"
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], **_TEXT).stdout
    places = [path for path in sys.path if path.endswith("-packages")]
    (Path(own.strip()) / "dependencies.pth").write_text("\n".join(places) + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], **_TEXT)

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {**_TEXT, "cwd": folder, "env": {**environment, "JAX_PLATFORMS": "cpu"}}
    where = subprocess.run([python, "-c", "import jaxcl; print(jaxcl.__file__)"], **options).stdout
    assert Path(where).is_relative_to(home)
    listed = subprocess.run([home / "bin" / "jaxcl", "configs"], **options).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped())
    short = ["training.steps=2", "tasks.*.train=60", "tasks.*.test=4"]
    ran = subprocess.run([home / "bin" / "jaxcl", "run", "quickstart_das", *short], **options)
    assert ran.stdout.strip() == "runs/quickstart_das/report.html"
    results = json.loads((folder / "runs/quickstart_das/results.json").read_text())
    assert results["finished"]
    assert len(results["matrix"]) == 3


_TEXT: dict[str, object] = {"check": True, "capture_output": True, "text": True}
