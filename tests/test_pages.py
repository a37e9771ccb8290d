"""README, pages and notebooks: their Python runs, their links lead somewhere, the site shows all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcl.reporting.report import write_report
from jaxcl.run import sequence

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *(DOCS / "reference").glob("index.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def text_of(page: Path) -> str:
    """A page's Markdown, without blocks of code."""
    text = "\n\n".join(cells(page, "markdown")) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    heads = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line and not line.startswith("#")]) <= 10
    # The same with less to learn and to answer.
    for given, fewer in (("train=800", "train=32"), ("limit=48", "limit=2")):
        assert given in block
        block = block.replace(given, fewer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sequence, "write_report", write_report)
    exec(compile(block, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["after category", "after direction", "after number"]
    assert Path(lines[3].rpartition(" ")[2]).is_file()


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            assert linked.exists(), target
            if anchor:
                assert anchor in anchors(linked), target


def test_the_site_shows_every_page() -> None:
    trees = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in [*DOCS.glob("*.md"), *NOTEBOOKS]}
    assert shown - {"reference/index"} == pages - {"index"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_small_enough_to_read(notebook: Path) -> None:
    assert notebook.stat().st_size < 100_000
    compile("\n".join(cells(notebook, "code")), notebook.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    code = "\n\n".join(cells(notebook, "code"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
