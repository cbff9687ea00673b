"""safeclip train --dry-run: what it says is what the run then does, and nothing is read or written for it."""

import re

import pytest

from pipeline.config.data import open_index
from pipeline.doctor.dry_run import dry_run, losses, stage_rows
from pipeline.training.curriculum import curriculum, epoch_steps, learning_rate
from shards.build.shapes import shapes
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("dry")
    shapes(made / "shapes", pairs=240, test=36)
    return made


def told(folder):
    made = config(folder, "run")
    made.run.dir = ""
    return "\n".join(dry_run(made))


def test_two_ranks_tell_a_run_whose_shards_are_not_there(folder):
    tars = list((folder / "shapes").rglob("*.tar"))
    for tar in tars:
        tar.rename(tar.with_suffix(".gone"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        text, _ = run_ranks(told, 2, folder)
    finally:
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        for tar in tars:
            tar.with_suffix(".gone").rename(tar)
    assert "24 pairs, 12 a rank, world size 2" in text
    assert "10 an epoch, 40 in 4 epochs" in text
    seconds = {kind: float(took) for kind, took in re.findall(r"^(clip|unimodal) +\d +([\d.]+) ", text, re.M)}
    assert seconds.keys() == {"unimodal", "clip"} and all(seconds.values())


@pytest.mark.parametrize("changes", [{}, {"train__unimodal_epochs": 0, "train__low_rate_epochs": 0}])
def test_stages_steps_and_rates_are_those_of_the_curriculum(folder, changes):
    made = config(folder, "run", train__steps_before_selection=6, train__schedule="run", **changes)
    counts = open_index(made.data).counts
    steps = int(counts.sum()) // made.train.batch_size
    epochs = curriculum(made.train, made.selection.every, steps)
    rows, done, total = {row[0]: row for row in stage_rows(made, epochs, steps)}, 0, made.train.epochs * steps
    for stage, row in rows.items():
        rates = []
        for epoch in (epoch for epoch in epochs if epoch.stage == stage):
            count = len(epoch_steps(epoch, counts, None, made)) if stage != "safeclip" else steps - epoch.begin
            rates += [learning_rate(epoch, done + step, total, made.train) for step in range(count)]
            done += count
        assert int(row[2]) == len(rates)
        assert [float(rate) for rate in row[3:]] == pytest.approx([rates[0], max(rates), rates[-1]], rel=0.01)
    assert done == total and sum(int(row[2]) for row in rows.values()) == total


def test_losses_are_those_that_the_stages_have(folder):
    made = config(folder, "run", selection__risky="unimodal", train__unimodal_epochs=0, train__low_rate_epochs=0)
    assert losses(made, curriculum(made.train, 1, 10)) == ["clip", "unimodal"]
