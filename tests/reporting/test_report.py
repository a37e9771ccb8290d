import json
from pathlib import Path

import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.reporting import run_data
from jaxcl.reporting.report import headline, write_report
from jaxcl.reporting.run_data import _tables
from jaxcl.reporting.style import MINUS
from tests.tiny.invented_runs import make_run
from tests.tiny.pages import check_page

HOSTILE = [
    "</style></svg><script>alert(1)</script>",
    "$\\frac{x$ & \" onload='x' 东京 \u202e",
    "a\x00b\ud83d\n<img src=x onerror=y>",
]


@pytest.fixture(scope="module")
def seekr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "seekr", "seekr", tasks=3)


def report_of(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_report_of_a_task_sequence(seekr: Path) -> None:
    page = check_page(report_of(seekr))
    results = json.loads((seekr / "results.json").read_text(encoding="utf-8"))
    assert "seekr on 3 tasks" in page.text
    assert f"Overall performance{results['op']:.1f}%" in page.text
    for row in results["matrix"]:
        for score in row:
            assert score is None or f"{score:.1f}" in page.text
    for heading in (
        "Every task after every task", "Retention of each task", "Training", "Sensitivity", "Forgettability",
        "Heads selected by each task", "What the model answers", "How it ran", "Configuration and versions",
    ):  # fmt: skip
        assert heading in page.text
    assert "✗ wrong" in page.text
    assert "stdlib:unicode_category" in page.text  # the configuration
    assert results["versions"]["jax"] in page.text
    # Retention, loss, other curves, three pictures of importance, selected heads and their overlap.
    assert page.counts["svg"] == 8
    assert page.counts["details"] >= 6
    assert not list(seekr.glob("*.partial"))


def test_what_was_not_finite_is_said_by_task(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=2)
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert "skipped" not in check_page(report_of(folder)).text
    first, second = results["tasks"]
    counts = {"skipped": {first: 2, second: 0}, "rewinds": {first: 1, second: 0}}
    counts["spikes"] = {first: [], second: list(range(5, 17))}
    path.write_text(json.dumps({**results, "steps": {first: 40, second: 40}, **counts}), encoding="utf-8")
    page = check_page(report_of(folder)).text
    assert (
        f"{first}: 2 of 40 steps skipped, because loss or gradient was not finite; went back to a checkpoint once"
        in page
    )
    assert f"{second}: spikes of the loss at steps 5, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 2 more" in page


def test_report_of_domains_shows_masks_and_capacity(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "das", "das", tasks=2)
    page = check_page(report_of(folder))
    for heading in ("Soft masks and the capacity left", "Capacity left after each domain", "perplexity", "all so far"):
        assert heading in page.text
    with np.load(folder / "importance" / "after01.npz") as tables:
        mean = 1 - tables["importance_heads"].mean()
        above = (tables["importance_heads"] > 0.5).mean()
    assert f"mean {mean:.2f}" in page.text
    assert f"{100 * above:.0f}% of attention heads" in page.text
    assert "What the model answers" not in page.text


def test_report_of_joint_training(tmp_path: Path) -> None:
    page = check_page(report_of(make_run(tmp_path / "joint", "joint", tasks=2)))
    assert "after all tasks" in page.text
    assert "none: all tasks were learned at once" in page.text
    assert "Retention of each task" not in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "hostile", "seekr", tasks=3, names=HOSTILE)
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    content["method"] = "<b onclick=x>&amp;"
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    page = check_page(report_of(folder))
    assert "<b onclick=x>&amp; on 3 tasks" in page.text
    assert "</style></svg><script>alert(1)</script>" in page.text
    assert "Content-Security-Policy" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("tasks", [1, 15])
def test_short_and_long_sequences(tmp_path: Path, tasks: int) -> None:
    page = check_page(report_of(make_run(tmp_path / "run", "sequential", tasks=tasks)))
    assert f"on {tasks} task{'s' if tasks > 1 else ''}" in page.text


def test_only_results_are_needed(seekr: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes((seekr / "results.json").read_bytes())
    page = check_page(report_of(tmp_path))
    assert "Every task after every task" in page.text
    assert "Training" not in [line.strip() for line in page.words]


def test_broken_files_are_named_and_left_out(seekr: Path, tmp_path: Path) -> None:
    for name in ("results.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((seekr / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 361, "lo')  # killed while writing
    for folder, name in (("importance", "after02.npz"), ("predictions", "after02_task00.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"PK\x03\x04 no archive\n")
    page = check_page(report_of(tmp_path))
    assert "importance/after02.npz: cannot be read" in page.text
    assert "metrics.jsonl: 1 unreadable line left out" in page.text
    assert "after02_task00.jsonl: 1 unreadable line left out" in page.text
    assert "What the model answers" not in page.text


@pytest.mark.parametrize("damage", ["nothing in it", "no archive", "a later version of zip"])
def test_a_damaged_archive_is_a_problem_and_no_error(damage: str, tmp_path: Path) -> None:
    path, problems = tmp_path / "after02.npz", list[str]()
    np.savez(path, mlp=np.ones(3))
    content = path.read_bytes()
    assert _tables(tmp_path, problems)
    np.save(tmp_path / "array.npy", np.ones(3))
    place = content.index(b"PK\x01\x02") + 6  # in the directory: the version that is needed to read it
    path.write_bytes(
        {
            "nothing in it": b"",
            "no archive": (tmp_path / "array.npy").read_bytes(),
            "a later version of zip": content[:place] + b"\xff" + content[place + 1 :],
        }[damage]
    )
    assert not _tables(tmp_path, problems)
    assert len(problems) == 1
    assert problems[0].startswith("importance/after02.npz: cannot be read: ")


def test_an_unfinished_run_says_so(seekr: Path, tmp_path: Path) -> None:
    content = json.loads((seekr / "results.json").read_text(encoding="utf-8"))
    content |= {"finished": False, "matrix": content["matrix"][:1], "bwt": None, "fwt": None, "forgetting": None}
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    page = check_page(report_of(tmp_path))
    assert "Not finished: 1 of 3 tasks learned so far." in page.text
    content["matrix"] = []
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    assert "0 of 3 tasks" in check_page(report_of(tmp_path)).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json"),
        ("[", "cannot be read"),
        ("[]", "not a jaxcl result: 'method' is missing"),
        ('{"method":"x","seed":0,"tasks":["a"],"metric":["accuracy"],"matrix":[["x"]]}', "matrix is not a list"),
        ('{"method":"x","seed":0,"tasks":["a"],"metric":["accuracy"],"matrix":[[1,2]]}', "matrix is not a list"),
    ],
)
def test_a_folder_without_usable_results_is_one_clear_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_headline_colours_follow_meaning_not_sign() -> None:
    base = {"metric": ["accuracy"] * 2, "op": 50.0, "bwt": -3.0, "forgetting": 3.0, "fwt": 2.0, "seconds": 7200}
    cards = headline(base)
    assert f'class="value bad">{MINUS}3.0<' in cards
    assert 'class="value bad">3.0<' in cards
    assert 'class="value good">+2.0<' in cards
    assert 'class="value ">50.0<small>%<' in cards
    assert 'class="value ">2.0<small>h<' in cards
    cards = headline({**base, "metric": ["perplexity"] * 2, "forgetting": -1.0, "bwt": None})
    assert f'class="value good">{MINUS}1.0<' in cards
    assert "points" not in cards
    assert "%" not in cards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [1]}, "data is not an object"),
        ({"versions": [1]}, "versions is not an object"),
        ({"further": 5}, "further is not an object"),
        ({"timing": {"a": "x"}}, "timing holds something else than seconds"),
        ({"matrix": [[1.0] * 99]}, "matrix is not a list of rows of numbers"),
        ({"tasks": 5}, "its files do not hold what a run writes"),
        ({"data": {"a": {"task": 5}}}, "its files do not hold what a run writes"),
        ({"further": {"a": 5}}, "its files do not hold what a run writes"),
    ],
)
def test_odd_results_are_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=2)
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)


def test_deeply_nested_lines_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=2)
    for file in (folder / "metrics.jsonl", *folder.glob("predictions/*.jsonl")):
        file.write_bytes(b"[" * 100_000 + b"\n" + file.read_bytes())
    assert "metrics.jsonl: 1 unreadable line left out" in check_page(report_of(folder)).text
    (folder / "results.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        write_report(folder)


def test_a_page_is_not_written_through_a_link(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=2)
    (tmp_path / "other").write_text("mine")
    (folder / "report.html.partial").symlink_to(tmp_path / "other")
    report_of(folder)
    assert (tmp_path / "other").read_text() == "mine"


def test_arrays_that_would_take_far_more_than_their_file_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", "seekr", tasks=1)
    assert run_data.read_run(folder).tables
    monkeypatch.setattr(run_data, "_MOST_BYTES", 100)
    run = run_data.read_run(folder)
    assert not run.tables
    assert run.problems == ["importance/after00.npz: cannot be read: more than 0 MiB of arrays"]
