"""The tables of made rows: what is a mean, what a worst run, what is void, what is marked, what was not run."""

import numpy as np
import pytest
import yaml
from scipy import stats

from pipeline.evaluation.comparison.progress import Progress
from pipeline.evaluation.comparison.report import not_run, write_report
from pipeline.evaluation.comparison.results import append_result
from pipeline.evaluation.comparison.table import (
    SetRows,
    attack_table,
    knowledge_table,
    main_table,
    rate_table,
    selection_table,
)


def attack(success, count=1000, **more):
    rounds = {"recall": [0.5, 0.9], "auroc": [0.6, 0.95], "fpr_at_full_recall": [0.8, 0.4]}
    figures = {"judged": "backdoor", "success": success, "interval": [0, 1], "count": count, "base": 0.02}
    return {**figures, "true_class": 0.6, "rounds": rounds, **more}


def row(defence, seed, clean, group="a", poisoned=True, name="photos", seconds=100.0, recall=(), **success):
    """Of a cell; `success`: {attack: share}."""
    rounds = {
        "recall": list(recall),
        "false_positives": [0.3, 0.06][: len(recall)],
        "auroc": [0.7, 0.98][: len(recall)],
    }
    rounds["fpr_at_full_recall"] = [0.9, 0.1][: len(recall)]
    return {
        "cell": f"{name}{defence}{seed}{group}{poisoned}",
        "set": name,
        "group": group,
        "defence": defence,
        "seed": seed,
        "poisoned": poisoned,
        "commit": "abc",
        "clean_top1": clean,
        "clean_top5": clean + 0.1,
        "linear_probe": None,
        "retrieval": {way: {"r1": 0.1, "r5": 0.2, "r10": 0.3} for way in ("image_to_text", "text_to_image")},
        "seconds": seconds,
        "seconds_before": 20.0 if defence == "dao" else 0.0,
        "seconds_own": seconds + 10,
        "sample_views": 1000,
        "rounds": rounds,
        "poison_trained_on": 0.1 * seed,
        "attacks": {kind: attack(rate) for kind, rate in success.items()},
    }


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


def test_success_is_mean_and_worst_beside_models_that_never_saw_poison():
    table = main_table(SetRows("photos", ROWS))
    dao = cells(table, "dao")
    assert dao["badnets†"] == "4.0 / 6.0 (4.0)" and dao["sig"] == ""
    half = stats.t.ppf(0.975, 1) * np.std([69, 65], ddof=1) / 2**0.5
    assert dao["clean top-1"] == f"67.0 ± {half:.1f}"
    # Seed 0 of plain CLIP has two groups, which count once together: (70 + 68) / 2 and 72.
    assert cells(table, "none")["clean top-1"].startswith("70.5 ± ")
    assert cells(table, "none, no poison")["badnets†"] == "(4.0)"


def test_an_attack_that_does_not_take_undefended_is_void_in_every_row():
    found = SetRows("photos", ROWS)
    table = main_table(found)
    assert (found.void(("a", "badnets")), found.void(("a", "blended")), found.void(("b", "sig"))) == (
        False,
        True,
        False,
    )
    for defence, seeds, text in [
        ("none", "0 1†", "void: 60.0 / 70.0 (2.0)"),
        ("dao", "0 1†", "void: 20.0 / 30.0 (2.0)"),
        ("default", "0†", "void: 20.0 / 20.0 (2.0)"),
        ("default", "3", "void: 20.0 / 20.0 (2.0)"),
    ]:
        assert cells(table, defence, seeds)["blended†"] == text
    assert cells(attack_table(found), "blended†", "dao")["success"] == "20.0 void"
    undefended_missing = main_table(SetRows("photos", [r for r in ROWS if r["defence"] != "none"]))
    assert cells(undefended_missing, "dao")["badnets†"] == "4.0 / 6.0 (?), undefended not run"


def test_what_rules_may_be_chosen_on_is_marked():
    table = main_table(SetRows("photos", ROWS))
    assert table.splitlines()[0] == "| defence | seeds | clean top-1 | badnets† | blended† | sig |"
    assert cells(table, "default", "0†") and cells(table, "default", "3")
    others = main_table(SetRows("emoji", [row("none", 0, 0.5, name="emoji", badnets=0.9)]))
    assert "†" not in others


def test_selection_is_that_of_the_last_round():
    table = selection_table(SetRows("photos", ROWS))
    late = cells(table, "default", "0†")
    assert late["poison recall, mean / worst"] == "90.0 / 90.0" and late["false positives"] == "6.0"
    assert late["AUROC"] == "0.980" and late["false positives at 100 % recall"] == "10.0"
    dao = cells(table, "dao")
    assert (
        dao["poison recall, mean / worst"] == "90.0 / 80.0"
        and dao["poison ever trained on, mean / worst"] == "5.0 / 10.0"
    )
    assert cells(table, "none")["poison recall, mean / worst"] == "no selection"
    assert cells(table, "*CASCADE (2026), on CC3M, as published*")["false positives at 100 % recall"] == "5.8"


def test_time_counts_what_comes_before():
    table = knowledge_table(SetRows("photos", ROWS))
    assert cells(table, "dao")["time / none's"] == "1.50" and cells(table, "none")["time / none's"] == "1.00"
    assert cells(table, "default", "3")["time / none's"] == "?"
    assert cells(table, "dao")["I→T R@5"] == "20.0" and cells(table, "dao")["top-5"].startswith("77.0")


def test_the_interval_of_a_success_is_of_all_pictures():
    table = attack_table(SetRows("photos", ROWS))
    low, high = stats.binomtest(80, 2000).proportion_ci(method="wilson")
    assert cells(table, "badnets†", "dao")["95 %"] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert cells(table, "badnets†", "dao")["poison recall"] == "90.0"


def test_rate_curves_stand_apart_with_clean_accuracy_beside():
    rates = [row("none", s, 0.7, group=f"rate{n}", sig=n / 100) for n in (25, 50) for s in (0, 1)]
    rates.append(row("default", 0, 0.6, group="rate50", sig=0.03))
    table = rate_table("photos", ROWS + rates)
    assert cells(table, "sig", "none")["25 pairs: clean top-1, success"] == "70.0, 25.0 / 25.0"
    assert cells(table, "sig", "default")["50 pairs: clean top-1, success"] == "60.0, 3.0 / 3.0"
    assert cells(table, "sig", "default")["25 pairs: clean top-1, success"] == ""
    assert main_table(SetRows("photos", ROWS + rates)) == main_table(SetRows("photos", ROWS))


def test_of_a_cell_the_last_row_counts():
    later = {**row("dao", 0, 0.9, badnets=0.5, blended=0.5), "cell": "of another config"}
    assert cells(main_table(SetRows("photos", [*ROWS, later])), "dao")["badnets†"].startswith("28.0 / 50.0")


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
    assert main_table(SetRows("photos", ROWS)) in report and text in report
    for picture in ("comparison.png", "rates_photos.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and picture in report


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
