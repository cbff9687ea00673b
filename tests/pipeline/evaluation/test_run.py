"""safeclip evaluate on a finished run: every figure of eval.json is there, and follows from what the run left."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml

from pipeline.cli.main import main
from pipeline.config.data import open_index, open_overlay, open_samples
from pipeline.config.load import load_config
from pipeline.evaluation.linear_probe import chosen_places, open_labels
from pipeline.evaluation.selection_quality import honest_pairs, poison_rows
from shards.order.safe_mask import SafeMask
from tests.helpers.models import MODEL
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import command

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
    "train": {
        "epochs": 2,
        "unimodal_epochs": 0,
        "low_rate_epochs": 0,
        "batch_size": 24,
        "warmup_steps": 2,
        "support_queue": 64,
    },
    "selection": {"batch_size": 64, "first_fraction": 0.4, "growth": 0.1, "every": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working directory, with poisoned shapes and four runs: safe (selection, 2 epochs), and of plain CLIP plain,
    filtered and honest, which is without poison."""
    folder, before = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(folder)
    main(["data", "shapes", "shapes", "--pairs", "360"])
    (folder / "attack.yaml").write_text(yaml.safe_dump(ATTACK))
    main(["attack", "attack.yaml"])
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    main(["mask", "oracle", "attack", "--index", "shapes/index", "--out", "oracle"])
    clip = ("preset=clip", "train.epochs=1")
    runs = [("run.dir=safe",), ("run.dir=plain", *clip), ("run.dir=filtered", "data.mask=oracle", *clip)]
    runs.append(("run.dir=honest", "data.overlay=null", *clip))
    for words in runs:  # a process each: DeepSpeed joins no second process group
        run_ranks(command, 1, folder, "train", "config.yaml", *words)
    yield folder
    os.chdir(before)


def evaluated(run, *words):
    """eval.json of a run, just written by the command."""
    main(["evaluate", run, *words])
    with open(f"{run}/eval.json") as file:
        return json.load(file)


def test_eval_json_holds_every_figure(world, capsys):
    # As launch/quickstart.sh asks: plain CLIP is its own baseline, before it has an eval.json.
    plain, found = evaluated("plain", "--baseline", "plain"), evaluated("safe", "--baseline", "plain")
    said = capsys.readouterr().out
    assert (
        found["unreadable"] == 0
        and 0 <= found["clean_top1"] <= found["clean_top5"] <= 1
        and 0 <= found["linear_probe"] <= 1
    )
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
    masks = [SafeMask.load(world / f"safe/masks/epoch_00{epoch}")[0].flags() for epoch in (1, 2)]
    rounds, rows = found["rounds"], poison_rows(overlay, index)
    assert rounds["epoch"] == [1, 2] and len(rows) == 14
    assert rounds["recall"] == pytest.approx([(~safe_N[rows]).mean() for safe_N in masks])
    honest_N = honest_pairs(overlay, index)
    assert rounds["false_positives"] == pytest.approx([(~safe_N[honest_N]).mean() for safe_N in masks])
    assert all(
        0 <= fraction <= 1 for key in ("auroc", "fpr_at_full_recall", "fpr_at_99_recall") for fraction in rounds[key]
    )
    ever_N = masks[0] | masks[1]
    for name, attack in found["attacks"].items():
        own = poison_rows(overlay, index, name)
        assert attack["fraction_trained_on"] == pytest.approx(ever_N[own].mean())
        assert attack["fraction_in_safe_set"] == pytest.approx([safe_N[own].mean() for safe_N in masks])
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


def refused(capsys, *words):
    """What the command says on its way out with exit code 2, in one line."""
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *words])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_labels_of_other_shards_are_refused(world, capsys):
    assert "evaluation.labels" in refused(capsys, "plain", "evaluation.labels=shapes/test_index")


def test_a_run_without_poison_has_trained_on_none(world, capsys):
    evaluated("plain")
    assert "does not take" in capsys.readouterr().out
    found = evaluated("honest", "data.overlay=attack", "--baseline", "plain")
    assert found["poison_trained_on"] == 0.0 and found["rounds"] is None and found["poison_in_safe_set"] == []
    for attack in found["attacks"].values():
        assert attack["took"] is attack["rounds"] is None and attack["fraction_trained_on"] == 0.0
        assert attack["fraction_in_safe_set"] == attack["auroc"] == [] and attack["count"] >= 2
    assert "does not take" not in capsys.readouterr().out


def test_a_baseline_is_plain_clip_on_the_same_poison(world, capsys):
    evaluated("plain")
    assert "train.method=safeclip" in refused(capsys, "safe", "--baseline", "safe")
    assert "data.mask=oracle" in refused(capsys, "safe", "--baseline", "filtered")
    assert "data.overlay=None, this evaluation's is attack" in refused(capsys, "safe", "--baseline", "honest")
    assert "run nowhere: no config.yaml" in refused(capsys, "safe", "--baseline", "nowhere")
    shutil.copytree("attack", "moved")
    assert evaluated("safe", "data.overlay=moved", "--baseline", "plain")["attacks"]["patch"]["took"] is False
    main(["attack", "attack.yaml", "attacks.patch.size=0.4", "out=other"])  # the same rows, another trigger
    told = refused(capsys, "safe", "data.overlay=other", "--baseline", "plain")
    assert "data.overlay=attack, this evaluation's is other" in told


def test_another_mask_in_the_place_of_the_filters_is_refused(world, capsys):
    main(["mask", "oracle", "attack", "--index", "shapes/index", "--fraction", "0.5", "--out", "half"])
    os.rename("oracle", "aside")
    shutil.copytree("half", "oracle")
    assert "data.mask: oracle is another mask than filtered was trained on" in refused(capsys, "filtered")
    shutil.rmtree("oracle")
    assert evaluated("filtered", "data.mask=aside")["poison_trained_on"] == 0.0
    os.rename("aside", "oracle")


def test_a_test_set_of_other_classes_is_refused(world, capsys):
    shutil.copytree("shapes", "renamed", ignore=shutil.ignore_patterns("index", "labels", "train"))
    names = (world / "shapes/classnames.txt").read_text()
    (world / "renamed/classnames.txt").write_text(names.replace("red star", "red sun"))
    told = refused(capsys, "plain", "evaluation.test=renamed")
    assert "'red star'" in told and "renamed/classnames.txt, it is 'red sun'" in told


def test_linear_probe_needs_labels_and_never_learns_from_poison(world, monkeypatch):
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
