import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcl.reporting.comparison import comparison_table, read_comparison, write_comparison
from jaxcl.reporting.frontier import Point, choose, difference, front, measured
from jaxcl.reporting.intervals import Interval, mean_interval, paired_interval
from jaxcl.reporting.rebuild import rebuild
from tests.tiny.invented_runs import make_run
from tests.tiny.pages import check_page

T_4 = 2.7764451052  # Student's t, 97.5%, 4 degrees of freedom


def point(method: str, setting: str, **values: list[float | None]) -> Point:
    blank: list[float | None] = [None] * max(map(len, values.values()))
    columns = {"op": blank, "bwt": blank, "learned": blank, "anytime": blank, "dev": blank, **values}
    rows = [{"seed": seed, **{name: column[seed] for name, column in columns.items()}} for seed in range(len(blank))]
    return Point(method, setting, rows)


def test_the_interval_is_students() -> None:
    values = [3.0, 5.0, 4.0, 8.0, 5.0]
    deviation = np.sqrt(sum((value - 5) ** 2 for value in values) / 4)
    assert mean_interval(values) == pytest.approx((5.0, T_4 * deviation / np.sqrt(5), 5))
    assert mean_interval([]) == (None, None, 0)


def test_pairs_are_formed_by_seed_and_only_of_seeds_that_both_have() -> None:
    first, second = {0: 1.0, 1: 12.0, 7: 100.0}, {1: 10.0, 0: 0.0}
    assert paired_interval(first, second).mean == 1.5
    assert paired_interval(first, second).size == 2
    assert not Interval(1.0, 1.5, 3).clear
    assert Interval(-2.0, 1.5, 3).clear


def test_the_best_on_dev_rows_is_chosen_though_another_is_better_on_the_scored_rows() -> None:
    points = [
        point("a", "x", op=[9.0, 9.0], dev=[1.0, 1.0]),
        point("a", "y", op=[1.0, 1.0], dev=[2.0, 2.0]),
        point("b", "x", op=[1.0, 1.0], dev=[5.0, None]),
        point("b", "y", op=[2.0, 2.0], dev=[4.0, 4.0]),
    ]
    marked, by = choose(points, [True, True])
    assert [(one.method, one.setting) for one in marked if one.chosen] == [("a", "y"), ("b", "y")]
    assert by == {"a": "dev", "b": "test"}  # b has a run without dev scores
    lower, _ = choose(points, [False, False])
    assert [(one.method, one.setting) for one in lower if one.chosen] == [("a", "x"), ("b", "x")]


def test_a_setting_that_lacks_a_seed_is_not_chosen() -> None:
    marked, _ = choose([point("a", "x", op=[9.0]), point("a", "y", op=[1.0, 1.0])], [True])
    assert [one.setting for one in marked if one.chosen] == ["y"]


def test_where_scores_point_different_ways_nothing_is_compared() -> None:
    marked, by = choose([point("a", "x", op=[1.0]), point("a", "y", op=[9.0])], [True, False])
    assert [one.setting for one in marked if one.chosen] == ["x"]
    assert by == {"a": "nothing"}


@pytest.mark.parametrize("higher", [True, False])
def test_the_line_joins_what_no_other_setting_beats_in_both(higher: bool) -> None:
    learned = {"low": 10.0, "middle": 20.0, "beaten": 19.0, "high": 30.0}
    bwt = {"low": -1.0, "middle": -3.0, "beaten": -4.0, "high": -9.0}
    sign = 1 if higher else -1
    points = [point("a", name, learned=[sign * learned[name]], bwt=[bwt[name]]) for name in learned]
    assert [one.setting for one in front(points, higher)] == ["high", "middle", "low"]


def test_a_difference_is_positive_where_a_method_is_better() -> None:
    ours, theirs = point("a", "", op=[5.0, 6.0], bwt=[-1.0, -1.0]), point("b", "", op=[3.0, 4.0], bwt=[-4.0, -4.0])
    assert difference(ours, theirs, "op", True).mean == 2.0
    assert difference(ours, theirs, "op", False).mean == -2.0  # a perplexity
    assert difference(ours, theirs, "bwt", False).mean == 3.0  # has its sign already


def test_what_a_matrix_amounts_to() -> None:
    result = {"matrix": [[80.0, None], [20.0, 60.0]], "metric": ["accuracy"] * 2, "dev": [30.0, 40.0]}
    assert measured(result) == {"learned": 70.0, "anytime": 60.0, "dev": 35.0}
    assert measured({**result, "dev": [30.0, None], "joint": True}) == {"learned": None, "anytime": None, "dev": None}


@pytest.fixture
def swept(tmp_path: Path) -> tuple[list[Path], dict[str, Any]]:
    runs, settings = [], []
    for method, names in {"sequential": ["rate=1"], "seekr": ["rate=1", "rate=2"]}.items():
        for name in names:
            for seed in (0, 1):
                runs.append(make_run(tmp_path / f"{method}-{name}-seed{seed}", method, seed=seed + 10 * len(settings)))
                settings.append(name)
                content = json.loads((runs[-1] / "results.json").read_text())
                content |= {"seed": seed, "dev": [50.0 + 10 * (name == "rate=1")] * 3}
                (runs[-1] / "results.json").write_text(json.dumps(content))
    return runs, {"keys": ["rate"], "settings": settings, "failed": {"ewc, rate=9, seed 0": "loss is nan <b>"}}


def test_the_page_shows_the_frontier_and_the_chosen_settings_in_detail(
    tmp_path: Path, swept: tuple[list[Path], dict[str, Any]]
) -> None:
    runs, sweep = swept
    page = write_comparison(tmp_path, runs, sweep)
    shown = check_page(page.read_text(encoding="utf-8"))
    for words in (
        "6 runs",
        "in detail: the 4 with a chosen setting",
        "Learning and keeping",
        "Chosen by the mean score on the dev rows",
        "Better than sequential by",
        "All settings",
        "ewc, rate=9, seed 0: loss is nan <b>",
    ):
        assert words in shown.text
    assert {f"{run.name.replace('=', '%3D')}/report.html" for run in runs} <= set(shown.links)
    content = read_comparison(tmp_path)
    assert [row["folder"] for row in content["runs"]] == [run.name for run in runs if "rate=1" in run.name]
    assert content["methods"]["seekr"]["seeds"] == [0, 1]
    assert "seekr (rate=1)" in comparison_table(content)


def test_a_page_built_again_is_the_same(tmp_path: Path, swept: tuple[list[Path], dict[str, Any]]) -> None:
    runs, sweep = swept
    page = write_comparison(tmp_path, runs, sweep)
    before = page.read_text(encoding="utf-8"), (tmp_path / "comparison.json").read_text(encoding="utf-8")
    page.unlink()
    assert rebuild(tmp_path) == page
    assert (page.read_text(encoding="utf-8"), (tmp_path / "comparison.json").read_text(encoding="utf-8")) == before


def test_without_dev_scores_the_page_says_that_scores_are_optimistic(
    tmp_path: Path, swept: tuple[list[Path], dict[str, Any]]
) -> None:
    runs, sweep = swept
    for run in runs:
        content = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps({**content, "dev": None}))
    page = write_comparison(tmp_path, runs, sweep)
    assert "so that their scores are optimistic" in check_page(page.read_text(encoding="utf-8")).text
