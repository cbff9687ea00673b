"""The tables of made rows: what is a mean, what a worst run, what is void, what is marked, what was not run."""

import numpy as np
import pytest
import yaml
from scipy import stats

from pipeline.evaluation.comparison.document import not_run, write_report
from pipeline.evaluation.comparison.picture import draw
from pipeline.evaluation.comparison.progress import Progress
from pipeline.evaluation.comparison.results import append_result
from pipeline.evaluation.comparison.rows import GroupRows, counted, groups_of, mixtures
from pipeline.evaluation.comparison.table import (
    attack_table,
    excess_table,
    knowledge_table,
    main_table,
    rate_table,
    selection_table,
    summary_table,
)
from tests.helpers.cells import row

ROWS = [
    row("none", 0, 0.70, badnets=0.99, blended=0.50),
    row("none", 1, 0.72, badnets=0.97, blended=0.70),
    row("none", 0, 0.68, group="b", sig=0.9),
    row("dao", 0, 0.69, badnets=0.02, blended=0.10, seconds=130.0, recall=(1.0,)),
    row("dao", 1, 0.65, badnets=0.06, blended=0.30, seconds=130.0, recall=(0.8,)),
    row("default", 0, 0.71, badnets=0.01, blended=0.2, recall=(0.5, 0.9)),
    row("default", 3, 0.66, badnets=0.05, blended=0.2, recall=(0.5, 0.7)),
    row("none", 0, 0.73, poisoned=False, badnets=0.03, blended=0.01),
    row("none", 1, 0.75, poisoned=False, badnets=0.05, blended=0.03),
]


def cells(table, *head):
    """{column: text} of the one line of a Markdown table that begins with these cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [line for line in lines[2:] if line[: len(head)] == list(head)]
    return dict(zip(lines[0], found))


def group(name="a", rows=ROWS, of="photos"):
    return GroupRows(of, name, counted(rows))


def test_success_is_mean_and_worst_beside_models_that_never_saw_poison():
    table = main_table(group())
    dao = cells(table, "dao")
    assert dao["badnets†"] == "4.0 / 6.0 (4.0)" and dao["runs"] == "2" and "sig" not in dao
    half = stats.t.ppf(0.975, 1) * np.std([69, 65], ddof=1) / 2**0.5
    assert dao["clean top-1"] == f"67.0 ± {half:.1f}"
    assert cells(table, "none")["clean top-1"].startswith("71.0 ± ")  # its run of group b is another table's
    assert cells(main_table(group("b")), "none")["clean top-1"] == "68.0"
    assert cells(table, "none, no poison")["badnets†"] == "(4.0)"


def test_groups_are_taken_together_over_the_runs_that_all_have():
    """none stands at 70 on a and at 50 on b, default at 65 on a alone: that is no table of none at 60 beside default at
    65."""
    rows = [row("none", 0, 0.7, badnets=0.9), row("none", 0, 0.5, group="b", sig=1.0), row("none", 1, 0.1, badnets=1)]
    rows.append(row("default", 0, 0.65, badnets=0.1))
    assert summary_table(groups_of(rows), True) == ""
    rows.append(row("default", 0, 0.55, group="b", sig=0.3))
    rows.append(row("dao", 0, 0.6, badnets=0.5))  # a third of the runs of none: without a line
    table = summary_table(groups_of(rows), True)
    assert "dao" not in table
    assert "(a: seeds 0; b: seeds 0)" in table and summary_table(groups_of(rows), False) == ""
    table = table[table.index("|") :]
    for defence, clean, rates in (("none", "60.0", "95.0 / 100.0"), ("default", "60.0", "20.0 / 30.0")):
        found = cells(table, defence)
        assert (found["runs"], found["clean top-1"]) == ("2", clean)
        assert found["2 attacks that take, mean / worst attack"] == rates


def test_an_attack_that_does_not_take_undefended_is_void_in_every_row():
    found = group()
    table = main_table(found)
    assert (found.void("badnets"), found.void("blended"), group("b").void("sig")) == (False, True, False)
    for defence, seeds, text in [
        ("none", "0 1†", "void: 60.0 / 70.0 (2.0)"),
        ("dao", "0 1†", "void: 20.0 / 30.0 (2.0)"),
        ("default", "0†", "void: 20.0 / 20.0 (1.0)"),
        ("default", "3", "void: 20.0 / 20.0 (?)"),
    ]:
        assert cells(table, defence, seeds)["blended†"] == text
    assert cells(attack_table(found), "blended†", "dao")["success"] == "20.0 void"
    others = [row("none", seed, 0.7, badnets=0.5, blended=0.9) for seed in (3, 4)]  # it is told by the seeds of a line
    assert cells(main_table(group(rows=[*ROWS, *others])), "default", "3")["blended†"] == "20.0 / 20.0 (?)"
    undefended_missing = main_table(group(rows=[r for r in ROWS if r["defence"] != "none"]))
    assert cells(undefended_missing, "dao")["badnets†"] == "4.0 / 6.0 (?), undefended not run"


def test_excess_is_above_the_model_of_the_same_seed_and_of_attacks_that_take():
    """blended does not take; on badnets dao is at 2 and 6 %, models that never saw poison are at 3 and 5 %."""
    table = excess_table([group()])
    dao = cells(table, "dao")
    half = stats.t.ppf(0.975, 1) * np.std([-1, 1], ddof=1) / 2**0.5
    assert dao == {
        "defence": "dao",
        "seeds": "0 1†",
        "attacks": "1",
        "mean": f"0.0 ± {half:.1f}",
        "three worst attacks": "0.0 a badnets†",
        "worst run": "1.0 a badnets†, seed 1",
    }
    assert "| 3 |" not in table  # no model of that seed that never saw poison


def test_what_rules_may_be_chosen_on_is_marked():
    table = main_table(group())
    assert table.splitlines()[0] == "| defence | seeds | runs | clean top-1 | badnets† | blended† |"
    assert cells(table, "default", "0†") and cells(table, "default", "3")
    others = main_table(group(rows=[row("none", 0, 0.5, name="others", badnets=0.9)], of="others"))
    assert "†" not in others


def test_selection_is_that_of_the_last_round():
    table = selection_table(group())
    late = cells(table, "default", "0†")
    assert late["poison recall, mean / worst"] == "90.0 / 90.0" and late["false positives"] == "6.0"
    assert late["AUROC"] == "0.980" and late["false positives at 100 % recall"] == "10.0"
    dao = cells(table, "dao")
    assert (
        dao["poison recall, mean / worst"] == "90.0 / 80.0"
        and dao["poison trained on after the first round, mean / worst"] == "5.0 / 10.0"
    )
    assert cells(table, "none")["poison recall, mean / worst"] == "no selection"
    assert cells(table, "*CASCADE (2026), on CC3M, as published*")["false positives at 100 % recall"] == "5.8"


def test_time_counts_what_comes_before():
    table = knowledge_table(group())
    assert cells(table, "dao")["time / none's"] == "1.50" and cells(table, "none")["time / none's"] == "1.00"
    assert cells(table, "default", "3")["time / none's"] == "?"
    assert cells(table, "dao")["I→T R@5"] == "20.0" and cells(table, "dao")["top-5"].startswith("77.0")


def test_the_interval_of_a_success_is_of_all_pictures():
    table = attack_table(group())
    low, high = stats.binomtest(80, 2000).proportion_ci(method="wilson")
    assert cells(table, "badnets†", "dao")["95 %"] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert cells(table, "badnets†", "dao")["poison recall"] == "90.0"


def test_rate_curves_stand_apart_with_clean_accuracy_beside():
    rates = [row("none", s, 0.7, group=f"rate{n}", sig=n / 100) for n in (25, 50) for s in (0, 1)]
    rates.append(row("default", 0, 0.6, group="rate50", sig=0.03))
    table = rate_table("photos", ROWS + rates)
    assert cells(table, "sig", "none")["25 pairs: runs, clean top-1, success"] == "2, 70.0, 25.0 / 25.0"
    assert cells(table, "sig", "default")["50 pairs: runs, clean top-1, success"] == "1, 60.0, 3.0 / 3.0"
    assert cells(table, "sig", "default")["25 pairs: runs, clean top-1, success"] == ""
    assert [one.group for one in groups_of(counted(ROWS + rates))] == ["a", "b"]


def test_a_group_may_have_a_name_that_begins_like_a_rate_curve(tmp_path):
    rows = [row("none", 0, 0.7, group="rated", sig=0.9), row("none", 0, 0.7, group="rate25", sig=0.9)]
    assert [one.group for one in groups_of(rows)] == ["rated"]
    assert "25 pairs" in rate_table("photos", rows) and "| sig | none |" in rate_table("photos", rows)


def test_of_a_cell_the_last_row_counts():
    later = {**row("dao", 0, 0.9, badnets=0.5, blended=0.5), "cell": "of another config"}
    assert cells(main_table(group(rows=[*ROWS, later])), "dao")["badnets†"].startswith("28.0 / 50.0")


def test_the_report_says_what_was_not_run(tmp_path):
    sets = {"photos": {"config": "c", "attacks": {"a": "x", "b": "y"}}, "emoji": {"config": "c", "attacks": {"a": "z"}}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets, sort_keys=False))
    text = not_run(ROWS, tmp_path / "sets.yaml")
    assert "none (a: seeds 2; b: seeds 1 2; no poison: seeds 2)" in text and "dao (a: seeds 2; b: seeds 0 1 2)" in text
    assert text.splitlines()[1].startswith("- emoji: none, none_equal_views, score_filter, kdistance")
    for one in [*ROWS, *(row("none", 0, 0.7, group=f"rate{n}", sig=0.5) for n in (25, 50))]:
        append_result(tmp_path / "results.jsonl", one)
    write_report(tmp_path / "results.jsonl", tmp_path / "sets.yaml")
    report = (tmp_path / "comparison.md").read_text()
    assert main_table(group()) in report and " ".join(text.split()) in " ".join(report.split())  # lines are wrapped
    for picture in ("comparison.png", "rates_photos.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and picture in report


def written(tmp_path, rows):
    """The report of rows."""
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"photos": {"config": "c", "attacks": {"a": "x"}}}))
    for one in rows:
        append_result(tmp_path / "results.jsonl", one)
    write_report(tmp_path / "results.jsonl", tmp_path / "sets.yaml")
    return (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    "key, first, second, text",
    [
        (
            "attack",
            ("none", 0),
            ("dao", 0),
            "group a, seed 0: different poisons: old (a none 0, commit abc); new (a dao 0, ",
        ),
        ("setup", ("none", 0), ("dao", 1), "group a: different configs, data or attack configs: old (a none 0, "),
        (
            "recipe",
            ("dao", 0),
            ("dao", 1),
            "dao: different configs: old (a dao 0, commit abc); new (a dao 1, commit abc)",
        ),
    ],
)
def test_runs_that_are_not_of_one_kind_are_told(tmp_path, key, first, second, text):
    """Rows of other places fit with them: other seeds have other poison, other defences other configs, old rows no
    digest."""
    rows = [row(*first, 0.7, badnets=0.9), row(*second, 0.7, badnets=0.1), row("default", 0, 0.7, badnets=0.5)]
    assert "Not comparable" not in written(tmp_path, rows)
    rows[0][key], rows[1][key] = "old", "new"
    found = written(tmp_path, rows)
    assert f"\n- {text}" in found and "<summary>Not comparable: " in found
    rows[1][key] = "old"
    assert "Not comparable" not in written(tmp_path, rows)
    others = [{**row("none", 0, 0.7, badnets=0.9), key: "x"}, {**row("dao", 1, 0.7, badnets=0.9), key: "y"}]
    assert bool(mixtures(others)) == (key == "setup")


def test_the_last_line_of_a_place_counts(tmp_path):
    """Lines A, B, A: what the file says last."""
    a, b = row("none", 0, 0.7, badnets=0.9), {**row("none", 0, 0.5, badnets=0.8), "cell": "b"}
    assert cells(table_of(written(tmp_path, [a, b])), "none")["clean top-1"] == "50.0"
    assert cells(table_of(written(tmp_path, [a])), "none")["clean top-1"] == "70.0"


def table_of(report):
    """The first table of a group in a report."""
    return report[report.index("| defence | seeds") :].partition("\n\n")[0]


def test_a_row_of_a_defence_that_is_gone_is_told_and_no_time_is_no_ratio(tmp_path):
    rows = [row("none", 0, 0.7, badnets=0.9, seconds=0.0), row("hope", 0, 0.7, badnets=0.1)]
    rows += [row("hope", 0, 0.7, poisoned=False, badnets=0.1), row("none", 0, 0.7, group="z", poisoned=False, sig=0.1)]
    report = written(tmp_path, rows)
    assert "- photos, group a: a hope 0, commit abc: no such defence\n" in report and report.count("hope") == 2
    assert "- photos, group z: unpoisoned none 0, commit abc: no run on the poison of its group yet" in report
    assert cells(knowledge_table(group(rows=rows)), "none")["time / none's"] == "?"


def test_the_picture_counts_no_attack_that_was_not_run_undefended(tmp_path, monkeypatch):
    titles, shown = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, title, **_: titles.append(title))
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda figure, handles, names, **_: shown.extend(names))
    rows = [row("dao", 0, 0.7, badnets=0.1), row("none", 0, 0.7, group="b", sig=0.9, wanet=0.1)]
    draw(groups_of(rows), tmp_path / "picture.png")
    assert titles == ["photos a: undefended not run", "photos b: 1 of 2 attacks take"]
    assert shown == ["none"]


class Cell:
    def __init__(self, defence, name="photos"):
        self.defence, self.set = defence, type("Set", (), {"name": name})


class Pool:
    failed, stopped, running = {}, False, {}


@pytest.mark.parametrize(
    "defences, text",
    [
        (["dao", "dao"], "0 of 2 cells done, 0 processes running, about 2 min left"),  # 140 s each, two at a time
        (
            ["paper"] * 200,
            "0 of 200 cells done, 0 processes running, about 3 h 14 min left",
        ),  # unknown: mean of the set
    ],
)
def test_time_left_is_from_finished_cells_of_the_defence(defences, text):
    assert Progress([Cell(name) for name in defences], ROWS, jobs=2)(Pool) == text


def test_time_left_is_not_known_without_finished_cells():
    progress = Progress([cell := Cell("dao", "shapes"), Cell("paper", "shapes")], ROWS, jobs=1)
    assert progress(Pool).endswith("time left not known yet")
    progress.finished(cell, {**row("dao", 0, 0.5, name="shapes"), "seconds_own": 600.0})
    assert progress(Pool) == "1 of 2 cells done, 0 processes running, about 10 min left"
