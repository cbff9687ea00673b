"""safeclip evaluate on a finished run: every figure of eval.json is there, and follows from what the run left."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from pipeline.cli import main
from pipeline.configfile import load_config
from pipeline.data import open_index, open_overlay, open_samples
from pipeline.evaluation.linear_probe import chosen_places, open_labels
from pipeline.evaluation.selection_quality import honest_pairs, poison_rows
from shards.masks import SafeMask
from tests.pipeline.test_run import MODEL, safeclip

RECALLS = {"r1", "r5", "r10"}
ATTACK = {
    "index": "shapes/index",
    "labels": "shapes/labels",
    "test": "shapes/test_index",
    "classnames": "shapes/classnames.txt",
    "out": "attack",
    "attacks": {
        "patch": {"attack": "badnets", "pairs": 5},
        "single": {"attack": "single_target", "targets": 2, "captions": 3},
        "near": {"attack": "class_to_class", "pairs": 3, "source_class": "red star", "target_class": "red cross"},
    },
}
CONFIG = {
    "preset": "default",
    "data": {"index": "shapes/index", "overlay": "attack", "workers": 0, "streams": 4, "window": 64},
    "model": {"config": MODEL},
    "evaluation": {"test": "shapes", "every": 0},
    "train": {"epochs": 2, "unimodal_epochs": 0, "slow_epochs": 0, "batch_size": 24, "warmup_steps": 2, "pool": 64},
    "selection": {"batch_size": 64, "first_share": 0.4, "growth": 0.1, "copies": None, "suspicion": 0.0},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working directory, with poisoned shapes and three runs: safe (selection, 2 epochs), and of plain CLIP plain and filtered."""
    folder, before = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(folder)
    main(["data", "shapes", "shapes", "--pairs", "360"])
    (folder / "attack.yaml").write_text(yaml.safe_dump(ATTACK))
    main(["attack", "attack.yaml"])
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    main(["mask", "oracle", "attack", "--index", "shapes/index", "--out", "oracle"])
    clip = ("preset=clip", "train.epochs=1")
    runs = [("run.dir=safe",), ("run.dir=plain", *clip), ("run.dir=filtered", "data.mask=oracle", *clip)]
    with ThreadPoolExecutor() as pool:  # a process each: DeepSpeed joins no second process group
        list(pool.map(lambda words: safeclip("train", "config.yaml", *words), runs))
    yield folder
    os.chdir(before)


def evaluated(run, *words):
    """eval.json of a run, just written by the command."""
    main(["evaluate", run, *words])
    with open(f"{run}/eval.json") as file:
        return json.load(file)


def test_eval_json_holds_every_figure(world, capsys):
    plain, found = evaluated("plain"), evaluated("safe", "--baseline", "plain")
    said = capsys.readouterr().out
    assert 0 <= found["clean_top1"] <= found["clean_top5"] <= 1 and 0 <= found["linear_probe"] <= 1
    assert all(set(found["retrieval"][way]) == RECALLS for way in ("image_to_text", "text_to_image"))
    assert "linear probe" in said and "text to image: R@1" in said and "near: success" in said
    judged = {name: attack["judged"] for name, attack in found["attacks"].items()}
    assert judged == {"patch": "backdoor", "single": "single_target", "near": "class_to_class"}
    for attack in found["attacks"].values():
        low, high = attack["interval"]
        assert low <= attack["success"] <= high and attack["count"] >= 2 and attack["took"] is False
    assert plain["rounds"]["epoch"] == [] and plain["poison_trained_on"] == 1.0
    assert all(attack["took"] is False for attack in plain["attacks"].values())


def test_the_rounds_are_those_of_the_saved_masks(world):
    found, config = evaluated("safe"), load_config("safe/config.yaml")
    index = open_index(config.data)
    overlay = open_overlay(config.data, index)
    masks = [SafeMask.load(world / f"safe/masks/epoch_00{epoch}")[0].flags() for epoch in (0, 1)]
    rounds, rows = found["rounds"], poison_rows(overlay, index)
    assert rounds["epoch"] == [0, 1] and len(rows) == 14
    assert rounds["recall"] == pytest.approx([(~safe_N[rows]).mean() for safe_N in masks])
    honest_N = honest_pairs(overlay, index)
    assert rounds["false_positives"] == pytest.approx([(~safe_N[honest_N]).mean() for safe_N in masks])
    assert all(0 <= share <= 1 for key in ("auroc", "fpr_at_full_recall", "fpr_at_99_recall") for share in rounds[key])
    ever_N = masks[0] | masks[1]
    for name, attack in found["attacks"].items():
        own = poison_rows(overlay, index, name)
        assert attack["share_trained_on"] == pytest.approx(ever_N[own].mean())
        assert attack["share_in_safe_set"] == pytest.approx([safe_N[own].mean() for safe_N in masks])
    assert found["poison_trained_on"] == pytest.approx(ever_N[rows].mean())


def test_a_run_on_a_filters_mask_has_that_round(world):
    found = evaluated("filtered")
    assert found["rounds"] == {
        "epoch": [None],
        "recall": [1.0],
        "false_positives": [0.0],
        "auroc": [1.0],
        "fpr_at_full_recall": [0.0],
        "fpr_at_99_recall": [0.0],
    }
    assert found["poison_trained_on"] == 0.0 and all(a["took"] is None for a in found["attacks"].values())


def test_labels_of_other_shards_are_refused(world, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "plain", "evaluation.labels=shapes/test_index"])
    told = capsys.readouterr().err
    assert "evaluation.labels" in told and told.count("\n") == 1


def test_without_labels_there_is_no_linear_probe_and_it_never_learns_from_poison(world, monkeypatch):
    config = load_config("safe/config.yaml")
    index = open_index(config.data)
    samples = open_samples(config.data, index)
    places = chosen_places(samples, 0)
    assert len(places) == 360 - 14 and not set(places) & set(samples.overlay.poison)
    monkeypatch.setattr("pipeline.evaluation.linear_probe.MOST", 50)
    some = chosen_places(samples, 0)
    assert len(some) == 50 and some == sorted(some) == chosen_places(samples, 0) != chosen_places(samples, 1)
    (world / "shapes/labels").rename(world / "shapes/other")
    try:
        assert open_labels(config, index) is None
    finally:
        (world / "shapes/other").rename(world / "shapes/labels")
    labels = open_labels(config, index)
    assert np.array_equal(labels.index.counts, index.counts)
