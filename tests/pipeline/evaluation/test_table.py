"""The table of two runs."""

import json

import pytest

from pipeline.evaluation.table import compare, table
from shards.errors import UserError


def test_both_runs_stand_in_one_table_with_base_rates_and_what_did_not_take():
    def run(clean, success, took=None):
        attacks = {
            "badnets": {"success": success, "base": 0.01, "true_class": 0.5, "took": took},
            "blended": {"success": 0.3, "base": 0.02, "true_class": 0.25, "took": False},
        }
        return {"clean_top1": clean, "attacks": attacks, "sample_views": 2000, "seconds": 60.4}

    lines = table({"clip": run(0.8, 1.0, True), "safeclip": run(0.75, 0.02)}).splitlines()
    assert lines[2] == "| clean zero-shot top-1 | 80.0% | 75.0% | | |"
    assert lines[3] == "| badnets success | 100.0% | 2.0% | 1.0% | 50.0% / 50.0% |"
    assert lines[4].startswith("| blended success (attack did not take) | 30.0% | 30.0% |")
    assert lines[5:] == ["| sample views | 2,000 | 2,000 | | |", "| training time | 60 s | 60 s | | |"]


def evaluated(folder, names):
    """A run directory with an eval.json of these attacks, and the evaluations of its training, which had none."""
    attack = {"success": 0.5, "base": 0.1, "true_class": 0.2, "took": True, "fraction_in_safe_set": []}
    result = {"clean_top1": 0.5, "attacks": dict.fromkeys(names, attack), "sample_views": 10, "seconds": 1.0}
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({**result, "poison_in_safe_set": []}))
    line = {"step": 1, "stage": "clip", "eval": {"clean_top1": 0.4, "attacks": {}}}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_runs_are_compared_on_any_number_of_attacks_that_both_have(tmp_path):
    many = [f"attack {n}" for n in range(12)]
    clip, safe, other = (evaluated(tmp_path / name, names) for name, names in zip("abc", (many, many, many[:3])))
    assert compare(clip, safe, tmp_path / "out").count("success |") == 12
    assert (tmp_path / "out/result.png").stat().st_size
    with pytest.raises(UserError, match="c: its eval.json lacks the attack attack 3"):
        compare(clip, other, tmp_path / "out")
