import json
from pathlib import Path

import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.reporting.comparison import (
    collect,
    comparison_table,
    read_comparison,
    write_comparison,
    write_overview,
)
from jaxcl.reporting.comparison_data import spread
from jaxcl.reporting.rebuild import rebuild
from tests.tiny.invented_runs import make_matrix, make_run
from tests.tiny.pages import check_page

METHODS = ("sequential", "seekr", "joint")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compare")
    return [make_run(folder / f"{name}-seed{seed}", name, tasks=3, seed=seed) for name in METHODS for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_comparison(runs[0].parent, runs)


def test_numbers_are_means_and_sample_deviations_over_seeds(page: Path) -> None:
    content = read_comparison(page.parent)
    assert list(content["methods"]) == list(METHODS)
    for method in METHODS:
        matrices = [make_matrix(3, method, seed) for seed in range(3)]
        op = [matrix.overall_performance() for matrix in matrices]
        summary = content["methods"][method]
        assert summary["seeds"] == [0, 1, 2]
        assert summary["op"]["values"] == pytest.approx(op)
        assert summary["op"]["mean"] == pytest.approx(np.mean(op))
        assert summary["op"]["std"] == pytest.approx(np.sqrt(sum((x - np.mean(op)) ** 2 for x in op) / 2))
    assert content["methods"]["joint"]["bwt"] == {"mean": None, "std": None, "values": []}


def test_intransigence_is_measured_against_joint_training(page: Path) -> None:
    content = read_comparison(page.parent)
    joint = np.mean([make_matrix(3, "joint", seed).scores[0] for seed in range(3)], axis=0)
    expected = [make_matrix(3, "seekr", seed).intransigence(joint.tolist()) for seed in range(3)]
    assert content["methods"]["seekr"]["intransigence"]["values"] == pytest.approx(expected)
    assert content["methods"]["joint"]["intransigence"]["mean"] is None


def test_the_page_is_sound_and_links_to_every_run(page: Path, runs: list[Path]) -> None:
    assert page.name == "comparison.html"
    shown = check_page(page.read_text(encoding="utf-8"))
    assert {link for link in shown.links if link.endswith(".html")} == {f"{run.name}/report.html" for run in runs}
    content = read_comparison(page.parent)
    assert spread(content["methods"]["seekr"]["op"]) in shown.text
    assert "sequential, seekr and joint" in shown.text
    for heading in ("Summary", "Retention of each task", "Each task at the end", "The runs"):
        assert heading in shown.text
    assert shown.counts["svg"] == 3
    json.loads((page.parent / "comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_best_is_bold_and_joint_training_is_no_rival(page: Path) -> None:
    content = read_comparison(page.parent)
    html = page.read_text(encoding="utf-8")
    assert f"<b>{spread(content['methods']['seekr']['op'])}</b>" in html
    assert f"<b>{spread(content['methods']['joint']['op'])}</b>" not in html
    assert f"<b>{spread(content['methods']['sequential']['op'])}</b>" not in html


def test_text_table_lines_up(page: Path) -> None:
    lines = comparison_table(read_comparison(page.parent)).split("\n")
    assert [line.split()[0] for line in lines] == ["method", *METHODS]
    assert lines[0].split()[1:3] == ["OP", "BWT"]
    ends = {line.rstrip()[-5:].count(" ") < 5 and len(line) for line in lines}
    assert len(ends) == 1
    assert "±" in lines[1]


def test_a_single_seed_has_no_deviation(tmp_path: Path, runs: list[Path]) -> None:
    content = collect(tmp_path, [runs[0], runs[3]])
    assert content["methods"]["seekr"]["op"]["std"] is None
    assert "±" not in comparison_table(content)
    assert "Intransigence" not in comparison_table(content)


def test_domains_bring_their_other_measures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "das", "das", tasks=2)
    page = write_comparison(tmp_path / "out", [run])
    content = read_comparison(tmp_path / "out")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert content["methods"]["das"]["further"]["perplexity"]["op"]["values"] == [
        results["further"]["perplexity"]["op"]
    ]
    assert content["runs"][0]["folder"] == "../das"
    assert "Other measures of the same runs" in check_page(page.read_text(encoding="utf-8")).text


def test_an_unfinished_run_is_named_and_shown_as_far_as_it_got(tmp_path: Path, runs: list[Path]) -> None:
    half = tmp_path / "half"
    half.mkdir()
    content = json.loads((runs[3] / "results.json").read_text(encoding="utf-8"))
    content |= {"finished": False, "matrix": content["matrix"][:2], "seed": 7}
    (half / "results.json").write_text(json.dumps(content), encoding="utf-8")
    page = write_comparison(tmp_path, [runs[0], runs[3], half])
    assert "Not finished: half" in check_page(page.read_text(encoding="utf-8")).text


def test_one_page_about_several_comparisons(page: Path, tmp_path: Path) -> None:
    path = write_overview(page.parent / "index.html", {"SEEKR": page.parent, "<again>": page.parent}, "Quick & start")
    shown = check_page(path.read_text(encoding="utf-8"))
    assert shown.links.count("comparison.html") == 2
    assert "Quick & start" in shown.text
    assert "<again>" in shown.text
    with pytest.raises(UserError, match="No such file"):
        write_overview(tmp_path / "index.html", {"x": tmp_path}, "x")


def test_runs_of_other_tasks_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    other = make_run(tmp_path / "other", "sequential", tasks=2)
    with pytest.raises(UserError, match=f"{other}: has tasks"):
        write_comparison(tmp_path, [runs[0], other])
    with pytest.raises(UserError, match="no runs"):
        write_comparison(tmp_path, [])
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(UserError, match="not a jaxcl comparison"):
        read_comparison(tmp_path)


def test_pages_are_not_written_through_a_link(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "a", "replay", tasks=2)
    (tmp_path / "other").write_text("mine")
    for name in ("comparison.json.partial", "comparison.html.partial"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "other")
    write_comparison(tmp_path / "runs", [folder])
    assert (tmp_path / "other").read_text() == "mine"


def test_rebuilding_finds_out_what_a_folder_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "all" / "one" / "seekr-seed0", "seekr", tasks=2)
    page = write_comparison(run.parent, [run])
    page.unlink()
    assert rebuild(run) == run / "report.html"
    assert rebuild(run.parent) == page
    assert page.is_file()
    overview = rebuild(tmp_path / "all")
    assert overview == tmp_path / "all" / "index.html"
    assert "one/comparison.html" in check_page(overview.read_text(encoding="utf-8")).links
    for folder, message in ((tmp_path / "absent", "no such folder"), (tmp_path, "no results.json")):
        with pytest.raises(UserError, match=message):
            rebuild(folder)
