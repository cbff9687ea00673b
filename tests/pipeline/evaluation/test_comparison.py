"""launch/reproduce.sh's program: what is finished is not run again, what was interrupted resumes, what fails is
told."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation.comparison.__main__ import main
from pipeline.evaluation.comparison.cells import Cell
from pipeline.evaluation.comparison.plan import Plan, before
from pipeline.evaluation.comparison.results import append_result, read_results
from pipeline.evaluation.comparison.run import bring_back, wordnet_tasks
from pipeline.evaluation.comparison.sets import overlay_digest, read_sets
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.storage.files import write_json
from tests.helpers.cells import row

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


def test_what_was_interrupted_resumes_and_what_is_finished_is_not_run_again(folder, capfd):
    """Group b cannot be made, which costs group a nothing."""
    asked = words(folder, "--attacks", "a", "b", "--defences", "oracle")
    process = subprocess.Popen([sys.executable, "-m", "pipeline.evaluation.comparison", *asked], cwd=ROOT)
    deadline = time.monotonic() + 300
    while not list(folder.glob("work/tiny/a_seed0/oracle_*/checkpoints/step_0000001*/COMPLETE")):
        assert time.monotonic() < deadline and process.poll() is None, capfd.readouterr().err
        time.sleep(0.05)
    # While it is at work, no other call may be.
    with pytest.raises(UserError, match="another comparison"):
        main(asked)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 75 and not (folder / "results.jsonl").exists()
    assert main(asked) == 1
    error = capfd.readouterr().err
    assert "not done: tiny b seed 0: attack: exit code 2" in error and "1 of 1 cells done" in error
    (log,) = [path for path in folder.glob("work/tiny/a_seed0/oracle_*.log") if "judged" not in path.name]
    assert "resumes after step" in log.read_text() and log.read_text().count(": done, ") == 1
    (row,) = read_results(folder / "results.jsonl")
    assert (row["group"], row["poison_trained_on"], row["sample_views"]) == ("a", 0.0, 6 * 7 * 32)
    assert row["attacks"]["badnets"]["count"] > 0 and row["seconds_own"] >= row["seconds"]
    assert "oracle" in (folder / "comparison.md").read_text() and (folder / "comparison.png").stat().st_size > 1000
    # A second call starts no process.
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")}
    assert main(words(folder, "--attacks", "a", "--defences", "oracle")) == 0
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
    for cell, seconds in (("x", 1), ("y", 2), ("x", 3)):
        append_result(path, row("none", 0, 0.7, badnets=0.9, seconds=seconds) | {"cell": cell})
    assert [row["seconds"] for row in read_results(path)] == [2, 3]  # in the order of the last lines


GOOD = row("none", 0, 0.7, badnets=0.9)


@pytest.mark.parametrize(
    "line, message",
    [
        (json.dumps(GOOD)[:-3], "line 2 is no row"),
        (json.dumps(GOOD).encode().replace(b"photos", b"ph\xffotos"), "line 2 is no row .*utf-8"),
        ("[]", "line 2 is no row .*it has no attacks"),
        (json.dumps({key: GOOD[key] for key in GOOD if key != "seconds"}), "missing or of a wrong type: seconds;?"),
        (json.dumps(GOOD | {"rounds": {"recall": 1}, "group": None}), "wrong type: group, rounds"),
        (json.dumps(GOOD | {"attacks": {"sig": {"success": 0.5}}}), "wrong type: attacks.sig"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=message):
        read_results(path)


def test_a_cell_whose_row_is_taken_out_is_run_again(folder):
    """Its checkpoints are gone, and with them the mark that its training is done; so also in folders where that mark
    was left."""
    asked = words(folder, "--attacks", "a", "--defences", "oracle")
    assert main(asked) == 0  # it is finished after the test above
    (run_dir,) = folder.glob("work/tiny/a_seed0/oracle_*/")
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "finished").exists()
    (first,) = read_results(folder / "results.jsonl")
    (folder / "results.jsonl").unlink()
    write_json(run_dir / "finished", {"seconds": 1.0})
    assert main(asked) == 0
    (again,) = read_results(folder / "results.jsonl")
    assert again["cell"] == first["cell"] and again["attacks"] == first["attacks"] and again["seconds_own"] > 1.5
    assert (first["attack"], first["setup"], first["recipe"]) == (again["attack"], again["setup"], again["recipe"])


def test_a_row_tells_what_its_run_was_of(folder):
    """Of a defence's seeds the recipe is the same, of a group's rows the setup, of a seed's rows the poison."""
    none, dao, default = (cell.origin() for cell in cells(folder, "none", "dao", "default"))
    (other,) = (cell.origin() for cell in cells(folder, "none", overlay="y"))
    assert none["attack"] == dao["attack"] != other["attack"] and none["setup"] == default["setup"] == other["setup"]
    assert none["recipe"] != default["recipe"]
    (cell,) = cells(folder, "none")
    later = Cell(cell.set, "a", "none", 1, cell.overlay)
    assert later.config.hash() != cell.config.hash() and later.origin() == none
    one = replace(cell.set, overrides=(*cell.set.overrides, "train.lr=0.123"))
    changed = Cell(one, "a", "none", 0, cell.overlay).origin()
    assert changed["setup"] != none["setup"] and changed["recipe"] != none["recipe"]


def test_wordnet_is_fetched_where_it_is_used_and_a_row_names_the_source(folder, tmp_path, monkeypatch):
    (none,), (paper,) = cells(folder, "none"), cells(folder, "paper")
    one, recipes = {"s": replace(paper.set, data=("photos", "x"))}, []
    for there, source in ((tmp_path, "WordNet 3.0"), (None, "table")):
        monkeypatch.setattr("shards.views.wordnet.find", lambda: there)
        monkeypatch.setattr("pipeline.evaluation.comparison.cells.synonym_source", lambda: f"{source} in there")
        (paper,) = cells(folder, "paper")
        recipes.append(paper.origin()["recipe"])
        assert (paper.synonyms, none.synonyms) == (source, None)
        tasks = wordnet_tasks(one, ["paper"], tmp_path)
        assert [task.words[-2:] for task in tasks] == ([] if there else [["wordnet", "data/wordnet"]])
        assert wordnet_tasks(one, ["none", "default"], tmp_path) == []
        assert wordnet_tasks({"s": none.set}, ["paper"], tmp_path) == []  # the user's own shards
    assert recipes[0] != recipes[1]


def test_a_config_that_is_changed_back_brings_its_row_back(folder, tmp_path):
    """Lines A, B; then A is asked for again: its row counts, and nothing is run. Rows that are trusted stay as they
    are."""
    (cell,) = cells(folder, "none")
    a, b = (row("none", 0, 0.7, name="tiny", badnets=0.9) | {"cell": key} for key in (cell.key, "b"))
    for one in (a, b):
        append_result(tmp_path / "results.jsonl", one)
    for trust, expected in ((True, [a, b]), (False, [b, a]), (False, [b, a])):
        args = argparse.Namespace(results=tmp_path / "results.jsonl", trust_rows=trust)
        bring_back([cell], read_results(args.results), args)
        assert read_results(args.results) == expected
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_a_group_may_not_be_named_like_a_rate_curve(folder, tmp_path):
    values = yaml.safe_load((folder / "sets.yaml").read_text())
    values["tiny"]["attacks"] = {"rate25": f"{folder}/attack.yaml", "rated": f"{folder}/attack.yaml"}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="got a group rate25, the name of a rate curve's"):
        read_sets(tmp_path / "sets.yaml", None)


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
