import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from jaxcl.reporting import heat_maps, plots, unit_plots
from jaxcl.reporting.matrix_table import matrix_table
from jaxcl.reporting.run_data import RunData
from jaxcl.reporting.samples import chosen, samples_of, task_samples
from jaxcl.reporting.style import MINUS, Picture, per_row
from jaxcl.reporting.tables import table_sections

NAN = np.nan
LOWER = np.array([[80.0, NAN, NAN], [70.0, 60.0, NAN], [50.0, 65.0, 90.0]])
NAMES = ["first", "second", "third"]


def pictures() -> dict[str, str]:
    rng = np.random.default_rng(0)
    steps = np.arange(1000.0).tolist()
    return {
        "retention": plots.retention(NAMES, LOWER, "%"),
        "loss": plots.loss({"a": (steps, steps), "b": ([], [])}, [(0, "first"), (500, "second")], "loss", "loss"),
        "small": plots.small_curves({"x": (steps, steps), "y": (steps[:2], [NAN, 1.0])}, [0, 500]),
        "heat": heat_maps.heat_maps({"one": rng.random((3, 4)), "two": rng.random((3, 4))}, "head", "heat").svg(),
        "wide": heat_maps.heat_maps({"one": rng.random((2, 3000))}, "unit", "wide", sort=True).svg(),
        "flat": heat_maps.heat_maps({"zero": np.zeros((1, 1))}, "head", "flat").svg(),
        "selected": heat_maps.selected({"one": rng.random((3, 4)) > 0.5}).svg(),
        "overlaps": heat_maps.overlaps({"heads": rng.random((3, 2, 4)) > 0.5}, NAMES, "overlaps").svg(),
        "sorted": unit_plots.sorted_units(
            {"heads": rng.random((3, 2, 4))}, {"heads": rng.random((2, 4))}, NAMES, 0.5, "sorted"
        ).svg(),
        "needed": unit_plots.needed_shares({"heads": [20, 30, 40]}, {"heads": [20, 40, 70]}, NAMES, "needed").svg(),
        "histograms": plots.histograms({"heads": rng.random((3, 4))}, "mask"),
        "lines": plots.lines({"a": [1.0, NAN, 2.0]}, NAMES, "mean", "lines"),
        "compared": plots.compared_retention(NAMES, {"a": LOWER[None].repeat(2, 0)}, {"b": LOWER[2]}, ["b", "a"], "%"),
        "bars": plots.bars({"OP": {"a": [1.0, 2.0], "b": []}, "BWT": {"a": [-1.0]}}),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    before = dict(matplotlib.rcParams)
    drawn = pictures()
    assert dict(matplotlib.rcParams) == before  # the process's own style stays
    return drawn


def test_every_picture_is_one_well_formed_element(drawn: dict[str, str]) -> None:
    for name, picture in drawn.items():
        root = ElementTree.fromstring(picture)
        assert root.tag.endswith("svg"), name
        assert root.get("aria-label"), name


def test_pictures_take_colours_and_font_from_the_page(drawn: dict[str, str]) -> None:
    for name, picture in drawn.items():
        assert "DejaVu" not in picture, name
        assert "<style" not in picture, name
        assert "var(--font, sans-serif)" in picture, name
        # A colour of the style outside a variable would not follow dark mode.
        bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", picture)
        assert not re.search(r"#(0072b2|d55e00|1b1f24|5c6570|d9dee4)", bare), name


def test_pictures_are_the_same_every_time(drawn: dict[str, str]) -> None:
    assert plots.retention(NAMES, LOWER, "%") == drawn["retention"]


def test_powers_of_ten_are_numbers() -> None:
    drawn = plots.loss({"a": ([1, 2, 3, 4], [5.0, 0.5, 0.05, 0.005])}, [(0, "first")], "loss", "loss")
    assert ">0.01<" in drawn
    assert "mathdefault" not in drawn


def test_retention_writes_the_last_score_of_each_task(drawn: dict[str, str]) -> None:
    words = [element.text for element in ElementTree.fromstring(drawn["retention"]).iter() if element.text]
    for score in ("50.0", "65.0", "90.0"):
        assert score in words


def test_long_curves_are_thinned_without_moving_them() -> None:
    steps = np.arange(10_000.0)
    kept, values = plots.thinned(steps, 2 * steps + 1)
    assert len(kept) == 400
    np.testing.assert_allclose(values, 2 * kept + 1)
    assert values.mean() == pytest.approx((2 * steps + 1).mean())


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (8, 4), (9, 3), (15, 5)]
)
def test_panels_fill_their_rows(count: int, columns: int) -> None:
    assert per_row(count) == columns


def cells(table: str) -> list[tuple[str, str, float]]:
    """Class, text and depth of colour of every cell with a score."""
    found = re.findall(r'<td class="(cell[^"]*)" style="--share: (\d+)%">([^<]*)<', table)
    return [(classes, text, int(share)) for classes, share, text in found]


def results(**changes: Any) -> dict[str, Any]:
    matrix = [[80.0, 10.0], [60.0, 90.0]]
    return {"tasks": ["a", "b"], "metric": ["accuracy"] * 2, "matrix": matrix, "initial": [5.0, None], **changes}


def test_matrix_table_marks_learning_future_and_change() -> None:
    table = matrix_table(results())
    (initial, learned_a, future, earlier, learned_b) = cells(table)
    assert initial[0] == "cell future"
    assert future == ("cell future", "10.0", future[2])
    assert "learned" in learned_a[0]
    assert "learned" in learned_b[0]
    assert earlier[0].split() == ["cell", "deep"]
    assert f'<td class="bad">{MINUS}20.0</td>' in table
    assert table.count('class="none"') == 1  # not measured


def test_deeper_is_better_whatever_the_metric() -> None:
    high = {text: share for _, text, share in cells(matrix_table(results()))}
    assert high["90.0"] == 100
    assert high["5.0"] == 4
    low = matrix_table(results(metric=["perplexity"] * 2, higher_is_better=[False] * 2))
    shares = {text: share for _, text, share in cells(low)}
    assert shares["5.0"] == 100
    assert shares["90.0"] == 4
    assert f'<td class="good">{MINUS}20.0</td>' in low


def test_noise_does_not_fill_the_colour_scale() -> None:
    shares = [share for _, _, share in cells(matrix_table(results(matrix=[[80.0], [80.5, 80.2]], initial=None)))]
    assert max(shares) - min(shares) <= 3


def test_metrics_of_different_scale_are_coloured_apart() -> None:
    mixed = results(metric=["accuracy", "perplexity"], higher_is_better=[True, False], matrix=[[80.0], [60.0, 9.0]])
    shares = {text: share for _, text, share in cells(matrix_table(mixed | {"initial": None}))}
    assert shares["80.0"] == 100
    assert shares["9.0"] == 100


def run_of(**parts: Any) -> RunData:
    lists = {"metrics": [], "rounds": [], "problems": []}
    objects = {"predictions": {}, "thumbnails": {}, "tables": {}, "not_finite": {}}
    empty = {"results": results(), "config": "", **lists, **objects}
    return RunData(folder=Path(), **{**empty, **parts})


def row(prompt: str, prediction: str, correct: bool, score: float | None = None) -> dict[str, Any]:
    value = 100.0 * correct if score is None else score
    return {"prompt": prompt, "prediction": prediction, "answer": "yes", "score": value, "correct": correct}


def test_samples_pair_what_was_known_with_what_is_left() -> None:
    # The same prompt twice: the first then is the first now.
    learned = [row("p", "yes", True), row("q", "yes", True), row("p", "no", False)]
    end = [row("p", "no", False), row("p", "yes", True), row("q", "yes", True)]
    run = run_of(predictions={(0, "a"): learned, (1, "a"): end, (1, "b"): [row("z", "ye", False, 80.0)]})
    samples = samples_of(run, 0)
    assert [sample.forgotten for sample in samples] == [True, False, False]
    assert samples[1].learned is not None
    assert samples[1].learned["prediction"] == "no"
    shown = task_samples(run, 0, opened=True)
    assert "of 3 examples 2 fully right after learning, 2 at the end; 1 forgotten" in shown
    assert shown.index("✗ wrong") < shown.index("✗ wrong", shown.index("✗ wrong") + 1)
    single = task_samples(run, 1, opened=False)
    assert "0 of 1 fully right" in single
    assert "score 80" in single
    assert task_samples(run_of(), 0, opened=True) == ""


def test_samples_are_spread_and_few() -> None:
    run = run_of(predictions={(1, "a"): [row(str(number), "x", number % 2 == 0) for number in range(100)]})
    shown = chosen(samples_of(run, 0))
    assert len(shown) == 9
    prompts = [int(sample.end["prompt"]) for sample in shown]
    assert len(set(prompts)) == 9
    assert max(prompts) > 50  # not only the first ones


def test_a_long_prompt_keeps_its_end() -> None:
    run = run_of(predictions={(1, "a"): [row("x" * 5000 + "the question?", "", False)]})
    shown = task_samples(run, 0, opened=True)
    assert "the question?" in shown
    assert len(shown) < 3000
    assert "(nothing)" in shown


@pytest.mark.parametrize(
    ("prompt", "keys", "shown"),
    [
        ("[image a.png]What? <b>", ["k"], "IMAGE a.png|What? &lt;b&gt;"),
        ("See [image]and [image x]", ["k", "l"], "See IMAGE |and IMAGE x|"),
        ("See [image]", ["lost"], "See [image]"),  # no thumbnail
        ("See [image]and [image]", ["k"], "IMAGE |See [image]and [image]"),  # which is it?
        ("See [image]", None, "See [image]"),
        ("Without", [], "Without"),
    ],
)
def test_images_of_prompts_are_seen_in_their_places(prompt: str, keys: list[str] | None, shown: str) -> None:
    one = row(prompt, "yes", True) | ({} if keys is None else {"images": keys})
    run = run_of(predictions={(1, "a"): [one]}, thumbnails={"k": b"PNG", "l": b"PNG2"})
    cell = re.search(r'<td class="long">(.*?)</td>', task_samples(run, 0, opened=True))
    assert cell is not None
    picture = r'<img(?: alt="(.*?)" title=".*?")? class="thumbnail" src="data:image/png;base64,\w+=*">'
    found = re.sub(picture, r"{\1}", cell[1])
    found = re.sub(r"\{(?:\[image ?(.*?)\])?\}", r"IMAGE \1|", found)
    assert re.sub(r"</?bdi.*?>", "", found) == shown


def test_the_same_question_about_another_image_is_another_sample() -> None:
    learned = [row("[image]q", "yes", True) | {"images": ["a"]}, row("[image]q", "no", False) | {"images": ["b"]}]
    end = [row("[image]q", "no", False) | {"images": ["b"]}, row("[image]q", "yes", True) | {"images": ["a"]}]
    run = run_of(predictions={(0, "a"): learned, (1, "a"): end})
    assert [sample.forgotten for sample in samples_of(run, 0)] == [False, False]
    assert all(sample.learned is not None for sample in samples_of(run, 0))


def test_heads_are_shown_by_block_of_attention() -> None:
    blocks = np.zeros((4, 2, 3))
    blocks[1, 0, 0], blocks[3, 1, 2] = 3.0, 1.0
    drawn: list[Picture] = []

    def draw(picture: Picture) -> str:
        drawn.append(picture)
        return picture.svg()

    shown = "".join(table_sections({"importance_blocks": blocks}, ["a"], 1, draw))
    assert "Shares: words on images 75%, images on images 25%." in shown
    (picture,) = drawn
    words = re.findall(r">([^<>]+)</text>", picture.svg())
    assert [word for word in words if " on " in word] == ["words on images", "images on images"]
    assert "".join(table_sections({"importance_blocks": 0 * blocks}, ["a"], 1)) == ""


def test_arrays_of_unknown_shape_are_left_out() -> None:
    tables = {"scalar": np.float32(1), "flat": np.ones(3), "deep": np.ones((2, 2, 2, 2)), "empty": np.ones((0, 4))}
    assert "".join(table_sections(tables, ["a", "b"], 2)) == ""
    shown = "".join(table_sections({"agreement": np.eye(3)}, ["a", "b"], 2))
    assert "Agreement" in shown


def test_overlap_of_selected_heads_is_counted() -> None:
    chosen_heads = np.zeros((2, 2, 4), bool)
    chosen_heads[0, 0, :3] = True
    chosen_heads[1, 0, 2:4] = True  # one in common of four
    shown = "".join(table_sections({"selected_heads": chosen_heads}, ["a", "b"], 2))
    assert ">25%<" in shown
    assert "1 a: 3 in 1 layer<" in shown


def mask_tables(general: bool) -> dict[str, np.ndarray]:
    """Two layers of ten units; the domains need 2, 4 and 2 of them, the last a part of the second's."""
    domains = np.zeros((4, 2, 10))
    domains[0] = 0.1 * general
    domains[1, 0, :2] = 1
    domains[2, 1, :4] = 0.8
    domains[3, 1, 2:4] = 0.6
    return {"importance_heads": domains.max(axis=0), "domains_heads": domains}


def test_needed_units_are_counted_by_domain_and_for_all_so_far() -> None:
    drawn: dict[str, str] = {}

    def draw(picture: Picture) -> str:
        drawn[picture.name] = picture.svg()
        return drawn[picture.name]

    shown = "".join(table_sections(mask_tables(general=True), ["a", "b", "c", "later"], 3, draw))
    words = {name: re.findall(r">([^<>]+)</text>", svg) for name, svg in drawn.items()}
    shares = [word for word in words["needed units"] if word in ("10", "20", "30")]
    assert shares == ["10", "20", "10", "10", "30", "30"]  # by domain, then of all so far
    assert "general" in words["needed units"]
    assert "later" not in shown
    # Nothing in common but the last two: 2 of the 4 that either needs.
    assert sorted(word for word in words["overlap"] if "%" in word) == ["0%"] * 5 + ["50%"]
    assert {"importance heads", "sorted units"} <= drawn.keys()


def test_general_knowledge_that_was_not_measured_is_not_shown() -> None:
    assert "general" not in re.sub("general knowledge", "", "".join(table_sections(mask_tables(False), ["a"] * 3, 3)))


def test_sorted_curves_fall_and_end_where_the_units_end() -> None:
    values = np.random.default_rng(0).random((3, 700))
    shares, curve = unit_plots._falling(values)
    assert curve[0] == values.max()
    assert curve[-1] == values.min()
    assert len(curve) == 200
    for share, value in zip(shares, curve, strict=True):
        assert (values > value).mean() * 100 == pytest.approx(share, abs=100 / values.size)


def test_a_picture_is_kept_as_png_too(tmp_path: Path) -> None:
    path = heat_maps.heat_maps({"one": np.eye(3)}, "head", "importance heads").write_png(tmp_path)
    assert path.name == "importance_heads.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_deviations_stand_beside_the_scores() -> None:
    table = matrix_table(results(deviation=[[1.5, None], [None, 0.25]], initial_deviation=[None, None]))
    found = re.findall(r">([\d.]+) <small>± ([\d.]+)</small>", table)
    assert found == [("80.0", "1.5"), ("90.0", "0.2")]
