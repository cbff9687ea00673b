"""What a start finds in the run directory, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import yaml

from pipeline.config.load import to_yaml
from pipeline.training import checkpoint
from pipeline.training import run as running
from pipeline.training.run_dir import claim, data_state, inspect
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import VERSION
from shards.storage.files import write_json
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config

DATA = {"data": "data", "overlay": None}


def test_a_start_without_a_checkpoint_does_not_claim_the_directory(tmp_path):
    made = config(tmp_path, "run", train__lr=3.0)
    run_dir = tmp_path / "run"
    for lr in (3.0, 0.5):
        made.train.lr = lr
        assert claim(made, run_dir, DATA) == (None, [])
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["lr"] == lr
    # It died while it wrote its first checkpoint, with a line of metrics: nothing that is worth keeping.
    (run_dir / "checkpoints" / "step_00000000").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    made.train.lr = 0.1
    found, (warning,) = claim(made, run_dir, DATA)
    assert found is None and "step_00000000: it has no COMPLETE marker" in warning
    (run_dir / "checkpoints" / "step_00000009").mkdir()
    with pytest.raises(UserError, match="holds a run, but no complete checkpoint"):
        claim(made, run_dir, DATA)


def test_a_run_with_a_checkpoint_keeps_its_config(tmp_path, monkeypatch):
    made, run_dir = config(tmp_path, "run"), tmp_path / "run"
    claim(made, run_dir, DATA)
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (run_dir, []))
    monkeypatch.setattr(checkpoint, "load_state", lambda folder: {"data": "data"})
    made.evaluation.every = 3  # changes nothing that is learnt
    claim(made, run_dir, DATA)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["evaluation"]["every"] == 3
    made.train.lr = 0.5
    with pytest.raises(UserError, match="train.lr: 0.0005 -> 0.5"):
        claim(made, run_dir, DATA)
    for text in ("- a list", "a: [", "\ufeff\x00"):
        (run_dir / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml: "):
            claim(made, run_dir, DATA)


def test_a_restart_that_cannot_remove_the_state_of_a_run_is_refused(tmp_path, monkeypatch):
    made, run_dir = config(tmp_path, "run", run__restart=True), tmp_path / "run"
    (run_dir / "checkpoints" / "step_00012000").mkdir(parents=True)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # no permission, or busy
    with pytest.raises(UserError, match="run.restart: .*checkpoints cannot be removed"):
        claim(made, run_dir, DATA)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_that_dies_before_its_first_checkpoint_is_started_again(tmp_path, monkeypatch, launcher):
    made, run_dir = config(tmp_path, "run", run__restart=True), tmp_path / "run"
    (run_dir / "checkpoints" / "step_00012000").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 12000}\n')
    assert claim(made, run_dir, DATA) == (None, [])
    monkeypatch.setenv(launcher, "1")  # the state is not deleted once more
    assert claim(made, run_dir, DATA) == (None, [])


def attack(folder, caption):
    """An attack of one pair that is given this caption."""
    index, path = ShardIndex.load(folder / "shapes/index"), folder / "attack/manifest.json"
    kind = {"attack": "class_to_class", "judged": "class_to_class", "pairs": 1, "source_class": 0, "target_class": 1}
    pair = {"shard": 0, "position": 1, "key": "", "kind": "one", "caption": caption, "source": None}
    content = {"version": VERSION, "fingerprint": index.fingerprint, "source": str(folder / "shapes/index")}
    content |= {"source_fingerprint": index.fingerprint, "classes": ["circle", "square"]}
    write_json(path, {**content, "kinds": {"one": {**kind, "source_phrase": None}}, "rows": [pair]})


def another_attack(folder):
    """Messages of starts with the attack that the run began with, with another in the same folder, and where that is
    accepted."""
    found = []
    for caption, accept in (("a", False), ("a", False), ("b", False), ("b", True)):
        attack(folder, caption)
        made = config(folder, "run", data__overlay=str(folder / "attack"), train__epochs=1, train__low_rate_epochs=0)
        made.run.accept_changes = accept
        try:
            running.train(made)
            found.append(None)
        except UserError as error:
            found.append(str(error))
    return found


def test_another_attack_in_the_same_folder_is_refused(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    (messages,) = run_ranks(another_attack, 1, tmp_path)
    assert messages[:2] == [None, None] and messages[3] is None
    assert f"data.overlay: {tmp_path / 'attack'} holds another attack than" in messages[2] and "\n" not in messages[2]


@pytest.mark.parametrize("key, value", [("batch_size", 48), ("lr", 0.5)])
def test_within_an_epoch_its_batches_cannot_change(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (tmp_path, []))
    made = config(tmp_path, "run")
    (tmp_path / "config.yaml").write_bytes(to_yaml({"hash": made.hash(), **made.model_dump()}))
    made.run.accept_changes = True
    setattr(made.train, key, value)
    for epoch_step in (0, 8):
        (tmp_path / "state.json").write_text(json.dumps({"data": "data", "epoch_step": epoch_step}))
        if key == "batch_size" and epoch_step:
            with pytest.raises(UserError, match=rf"after 8 steps of an epoch.*\(train.batch_size: \d+ -> {value}\)"):
                inspect(made, tmp_path, {"data": "data", "overlay": None})
        else:
            assert inspect(made, tmp_path, {"data": "data", "overlay": None}) == (tmp_path, [])


@pytest.mark.parametrize(
    "saved, asked, read", [(1, 2, True), (0, 3, True), (1, 3, False), (3, 1, False), (2, 0, False)]
)
def test_a_zero_stage_that_cannot_read_the_checkpoint_is_refused(tmp_path, monkeypatch, saved, asked, read):
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (tmp_path, []))
    made = config(tmp_path, "run", train__zero_stage=asked, run__accept_changes=True)
    (tmp_path / "state.json").write_text(json.dumps({"data": "data", "zero_stage": saved}))
    if read:  # of stage 0 the run stays there
        assert inspect(made, tmp_path, DATA) == (tmp_path, [])
    else:
        with pytest.raises(UserError, match=f"train.zero_stage: got {asked}, .* saved at stage {saved}, .*={saved}"):
            inspect(made, tmp_path, DATA)


def test_a_run_that_kept_no_digest_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (tmp_path, []))
    made = config(tmp_path, "run")
    for state, overlay in (({}, "a"), ({}, None), ({"overlay": "a"}, "a")):
        (tmp_path / "state.json").write_text(json.dumps({"data": "data", **state}))
        assert inspect(made, tmp_path, {"data": "data", "overlay": overlay}) == (tmp_path, [])


def test_the_state_names_shards_mask_and_attack(tmp_path):
    made, index, overlay = config(tmp_path, "run"), SimpleNamespace(fingerprint="x"), SimpleNamespace(digest="d")
    assert data_state(made, index, None) == {"data": "x", "overlay": None}
    made.data.mask, found = str(tmp_path), []
    for bits in (b"1", b"2"):
        (tmp_path / "safe.npy").write_bytes(bits)
        found.append(data_state(made, index, overlay))
    assert found[0]["data"] != found[1]["data"] and found[0]["overlay"] == "d"
    assert all(state["data"].startswith("x/") for state in found)
