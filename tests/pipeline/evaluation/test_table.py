"""The table of two runs."""

from pipeline.evaluation.table import table


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
