"""README, pages and notebooks: their Python runs, their links lead somewhere, the site shows all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcl.methods.registry import METHODS
from jaxcl.reporting.report import write_report
from jaxcl.run import sequence

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *(DOCS / "reference").glob("index.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
REPRODUCTIONS = DOCS / "reproductions.md"
TIMES = "\N{MULTIPLICATION SIGN}"


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


def rows_of(text: str, columns: int) -> list[list[str]]:
    """The cells of the rows of all tables with that many columns, heads left out."""
    tables = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for table in tables for line in table.splitlines()]
    return [row for row in rows if len(row) == columns]


def names_in(cell: str) -> list[str]:
    """What a cell shows as code."""
    return re.findall(r"`([^`]+)`", cell)


def test_every_method_and_setting_has_a_verdict() -> None:
    rows = rows_of(REPRODUCTIONS.read_text(encoding="utf-8"), columns=5)
    assert {names_in(row[0])[0] for row in rows} >= set(METHODS)
    methods = (DOCS / "methods.md").read_text(encoding="utf-8").partition("\n## With any method\n")[2]
    settings = {name for row in rows_of(methods, columns=3) for name in names_in(row[0])}
    assert "optimizer.average: ema" in settings
    assert {name for row in rows for name in names_in(row[0])} >= settings
    for name, _, measured, verdict, record in rows:
        assert verdict in ("reproduced", "mechanism shown", "not reproduced", "not tried"), name
        assert (verdict == "not tried") == (measured == "") == (record == "none"), name


def test_what_the_reproductions_name_exists() -> None:
    text = REPRODUCTIONS.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:configs|benchmarks/records|tests/golden/plans)/[\w./-]*\w", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    papers = [*ROOT.glob("configs/seekr_llama2_7b_*.yaml"), ROOT / "configs" / "das_roberta_base.yaml"]
    assert len(papers) >= 5
    assert named >= {path.relative_to(ROOT).as_posix() for path in papers}
    commands = {names_in(row[0])[0] for row in rows_of(text, columns=2)}
    assert commands == {name for name in named if name.startswith("benchmarks/")}


def test_the_hours_of_the_papers_settings_are_those_of_kept_plans() -> None:
    rows = rows_of(REPRODUCTIONS.read_text(encoding="utf-8"), columns=4)
    estimates = [row[1:] for row in rows if row[3].startswith("`tests/golden/plans/")]
    assert len(estimates) >= 7
    for topology, estimate, name in estimates:
        plan = json.loads((ROOT / name.strip("`")).read_text(encoding="utf-8"))["plan"]
        assert plan["topology"] == topology.replace(" ", ":").replace(TIMES, "x")
        steps, batches, seconds, hours = re.findall(r"[\d.]+", estimate.replace(",", ""))
        assert seconds == f"{max(step['roofline_seconds'] for step in plan['steps'].values()):.4f}"
        assert hours == f"{int(steps) * int(batches) * float(seconds) / 3600:.2f}"
