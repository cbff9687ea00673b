"""The tables of many runs: means and worst seeds, and what a preset costs and leaves over all seeds."""

import json

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.table import GROUPS, difference_table, runs_table, summary_table
from shards.storage import write_json
from tests.benchmarks import replicas


@pytest.fixture
def root(tmp_path):
    """Two seeds of plain CLIP and of a preset that loses 1 and 4 points of clean accuracy, and gains 2 and 0 points of an attack."""
    for seed, (clean, success) in enumerate([(0.79, 0.03), (0.76, 0.01)]):
        for preset, top1, hit in (("clip", 0.8, 1.0), ("default", clean, success)):
            attack = {"success": hit, "base": 0.0, "unpoisoned": 0.01, "true_class": 0.5, "took": True}
            attack["unpoisoned_true_class"] = 0.5
            run = {"clean_top1": top1, "attacks": {"patch": attack}, "poison_in_safe_set": [], "sample_views": 10}
            run["poison_trained_on"] = 0.02 * seed
            (tmp_path / f"shapes/seed{seed}/{preset}").mkdir(parents=True)
            write_json(tmp_path / f"shapes/seed{seed}/{preset}/eval.json", run)
    return tmp_path


def test_the_mean_stands_beside_the_worst_seed(root):
    row = "| shapes | default | 0 to 1 | 77.5% / 76.0% | 2.0% / 3.0% (1.0%) | 0 | 1.0% / 2.0% |"
    assert summary_table(root).splitlines()[-1] == row
    assert summary_table(root, GROUPS).splitlines()[-1] == row


def test_a_seed_is_held_only_where_its_attacks_are_too(root):
    path = root / "shapes/seed0/default/eval.json"
    run = json.loads(path.read_text())
    run["attacks"]["patch"]["success"] = 0.05
    write_json(path, run)
    assert summary_table(root).splitlines()[-1].endswith(" | none | 1.0% / 2.0% |")


def test_each_run_is_held_against_plain_clip_of_its_seed_and_models_without_poison(root):
    (row,) = difference_table(root).splitlines()[2:]
    # Student's quantile of one degree of freedom is 12.706; the deviations are 2.12 and 1.41.
    assert row == "| shapes | default | 2 | -2.5 ± 19.1 | +1.0 ± 12.7 |"


def test_what_an_earlier_version_did_not_record_is_not_known(root):
    path = root / "shapes/seed1/default/eval.json"
    run = json.loads(path.read_text())
    del run["poison_trained_on"]
    write_json(path, run)
    assert summary_table(root).splitlines()[-1].endswith(" | 0 | ? |")
    assert runs_table(root).splitlines()[-1].endswith(" |  | ? | 10 |")


def test_a_difference_of_runs_has_welchs_interval():
    ours, others = [1.0, 2.0, 4.0], [0.0, 0.5, 0.25, 3.0]
    truth = stats.ttest_ind(ours, others, equal_var=False)
    mean, half = replicas.difference([ours], [others])
    assert mean == pytest.approx(np.mean(ours) - np.mean(others))
    assert mean + half == pytest.approx(truth.confidence_interval().high)
    # Over attacks each counts once, however many its runs, and what differs between attacks is no chance.
    mean, half = replicas.difference([[10.0, 12.0], [90.0, 92.0, 91.0]], [[10.0, 10.0], [90.0, 90.0]])
    assert mean == pytest.approx(1.0) and half < 3
    assert np.isnan(replicas.difference([[1.0], [2.0]], [[0.0, 1.0]])[1])  # one run of each says nothing of chance
