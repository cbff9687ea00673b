"""launch/reproduce.sh's program: what is finished is not run again, what was cut off goes on, what fails is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation.comparison.__main__ import main
from pipeline.evaluation.comparison.cells import Cell
from pipeline.evaluation.comparison.plan import Plan, before
from pipeline.evaluation.comparison.results import append_result, read_results
from pipeline.evaluation.comparison.sets import overlay_digest, read_sets
from shards.demo import shapes
from shards.errors import UserError
from shards.storage import write_json

ROOT = Path(__file__).parents[3]
SMALL = ["train.epochs=6", "train.batch_size=32", "train.warmup_steps=5", "data.window=256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sets.yaml, of a set tiny of 240 pairs: its attack group a is sound, b poisons more pairs than there are."""
    made = tmp_path_factory.mktemp("comparison")
    shapes(made / "data", pairs=240, test=36)
    attack = {key: f"{made}/data/{key}" for key in ("index", "labels")} | {"test": f"{made}/data/test_index"}
    attack |= {"classnames": f"{made}/data/classnames.txt", "out": f"{made}/unused", "seed": 0}
    attack["attacks"] = {"badnets": {"attack": "badnets", "pairs": 12}}
    (made / "attack.yaml").write_text(yaml.safe_dump(attack))
    overrides = [*SMALL, f"data.index={made}/data/index", f"evaluation.test={made}/data"]
    attack["attacks"] = {"badnets": {"attack": "badnets", "pairs": 100_000}}
    (made / "too_many.yaml").write_text(yaml.safe_dump(attack))
    groups = {"a": f"{made}/attack.yaml", "b": f"{made}/too_many.yaml"}
    tiny = {"config": str(ROOT / "configs/shapes_small.yaml"), "attacks": groups}
    tiny |= {"rates": f"{made}/attack.yaml", "overrides": overrides}
    (made / "sets.yaml").write_text(yaml.safe_dump({"tiny": tiny}))
    return made


def words(folder, *more):
    places = ["--definition", f"{folder}/sets.yaml", "--work", f"{folder}/work", "--results", f"{folder}/results.jsonl"]
    return [*places, "--jobs", "1", "--seeds", "0", *more]


def test_what_was_cut_off_goes_on_and_what_is_finished_is_not_run_again(folder, capfd):
    """Group b cannot be made, which costs group a nothing."""
    asked = words(folder, "--attacks", "a", "b", "--defences", "none")
    process = subprocess.Popen([sys.executable, "-m", "pipeline.evaluation.comparison", *asked], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(folder.glob("work/tiny/a_seed0/none_*/checkpoints/step_0000001*/COMPLETE")):
        assert time.monotonic() < deadline and process.poll() is None, capfd.readouterr().err
        time.sleep(0.05)
    # While it is at work, no other call may be.
    with pytest.raises(UserError, match="another comparison"):
        main(asked)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75 and not (folder / "results.jsonl").exists()
    assert main(asked) == 1
    error = capfd.readouterr().err
    assert "not done: tiny b seed 0: attack: exit code 2" in error and "1 of 1 cells done" in error
    (log,) = [path for path in folder.glob("work/tiny/a_seed0/none_*.log") if "judged" not in path.name]
    assert "goes on after step" in log.read_text() and log.read_text().count(": done, ") == 1
    (row,) = read_results(folder / "results.jsonl")
    assert (row["group"], row["poison_trained_on"], row["sample_views"]) == ("a", 1.0, 6 * 7 * 32)
    assert row["attacks"]["badnets"]["count"] > 0 and row["seconds_own"] >= row["seconds"]
    assert "none" in (folder / "comparison.md").read_text() and (folder / "comparison.png").stat().st_size > 1000
    # A second call starts no process.
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")}
    assert main(words(folder, "--attacks", "a", "--defences", "none")) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")} == times
    assert read_results(folder / "results.jsonl") == [row]


def cells(folder, *defences, poisoned=True, **changed):
    one = read_sets(folder / "sets.yaml", ["tiny"])["tiny"]
    for place in ("x", "y"):
        if not (folder / place / "manifest.json").exists():
            write_json(folder / place / "manifest.json", {"seed": 0, "source": str(folder / place), "rows": [place]})
    return [Cell(one, "a", name, 0, folder / changed.get("overlay", "x"), poisoned) for name in defences]


def test_a_key_changes_with_what_decides_a_cell_and_with_nothing_else(folder, tmp_path):
    none, again, dao, slof, clean = cells(folder, "none", "none", "dao", "slof", "cleanclip")
    (other,), (control,) = cells(folder, "none", overlay="y"), cells(folder, "none", poisoned=False)
    (control_of_other,) = cells(folder, "none", poisoned=False, overlay="y")
    assert none.key == again.key
    keys = {cell.key for cell in (none, dao, slof, clean, other, control, control_of_other)}
    assert len(keys) == 7
    assert control.run_key == control_of_other.run_key  # one run, judged by two groups
    # Not where the data lie: the same manifest from another place.
    write_json(tmp_path / "manifest.json", {"seed": 0, "source": "/elsewhere", "rows": ["x"]})
    assert overlay_digest(tmp_path) == overlay_digest(folder / "x")
    (tmp_path / "optimised.png").write_bytes(b"pixels")
    assert overlay_digest(tmp_path) != overlay_digest(folder / "x")


def test_what_a_cell_needs_is_run_once_and_before_it(folder):
    plan = Plan(cells(folder, "dao", "slof", "cleanclip", "none"), folder / "planned", folder / "none.jsonl")
    kinds = [task.name.partition("tiny a ")[2] for task in plan.tasks]
    assert (
        len(kinds) == len(set(kinds)) == 1 + 1 + 2 + 2 + 2 + 2 + 2
    )  # none, its scores, dao, slof, cleanclip, none judged
    for number, task in enumerate(plan.tasks):
        assert all(plan.tasks.index(need) < number for need in task.needs)
    training = next(task for task in plan.tasks if task.name.endswith("dao seed 0: training"))
    assert {need.name.rpartition(" ")[2] for need in before(training)} == {"training", "scoring", "mask"}
    assert any(word.startswith("data.mask=") for word in training.words)


def test_rate_curves_poison_as_many_pairs_as_they_say(folder):
    one = read_sets(folder / "sets.yaml", None, [25, 100])["tiny"]
    assert {group: attack.overrides for group, attack in one.attacks.items()} == {
        "rate25": ("attacks.badnets.pairs=25",),
        "rate100": ("attacks.badnets.pairs=100",),
    }
    assert one.attacks["rate25"].digest("f", 0) != one.attacks["rate100"].digest("f", 0)


def test_a_results_file_is_a_row_a_line(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    assert read_results(path) == []
    for cell, value in (("x", 1), ("y", 2), ("x", 3)):
        append_result(path, {"cell": cell, "value": value})
    assert [row["value"] for row in read_results(path)] == [3, 2]
    path.write_text(path.read_text() + json.dumps({"cell": "z"})[:-3])
    with pytest.raises(UserError, match="line 4 is no row"):
        read_results(path)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--sets", "moon"], "--sets: got 'moon', expected some of tiny"),
        (["--defences", "hope"], "--defences: got 'hope', expected some of none,"),
        (["--attacks", "z"], "--attacks: got 'z', expected some of a, b, unpoisoned"),
    ],
)
def test_what_is_not_there_is_refused_by_name(folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main([*words(folder, *more), "--work", str(tmp_path)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a shell")
def test_the_script_uses_the_environment_that_is_named(folder, tmp_path):
    """PYTHON_ENV's python runs the program; .venv is not made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    script = ["bash", str(ROOT / "launch/reproduce.sh"), *words(tmp_path), "--report-only"]
    script[script.index("--definition") + 1] = f"{folder}/sets.yaml"
    found = subprocess.run(script, env={**os.environ, "PYTHON_ENV": str(tmp_path)}, capture_output=True, text=True)
    assert found.returncode == 0 and "no finished cells yet" in found.stdout, found.stderr
