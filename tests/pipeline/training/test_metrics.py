"""Weights & Biases, offline: what it is told of a run is read from the file that would be uploaded."""

import json
import time

import pytest
import wandb

from pipeline.config.schema import Config
from pipeline.training.metrics import MetricsLogger, commit, flat, keep_whole_lines
from shards.errors import UserError

BLOCK = 32_768


def records(run_dir):
    """(kind, record) of the files of wandb's offline runs: LevelDB's log format (a checksum, a length of 2 bytes and a
    kind before each fragment of a record, blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # too small for a fragment
                at += BLOCK - at % BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # a whole record, or its last fragment
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                yield record.WhichOneof("record_type"), record
                whole = b""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Run directory of a run that stopped after its first selection round, and made a second one when it resumed."""
    run_dir = tmp_path_factory.mktemp("run")
    config = Config(preset="default")
    config.wandb.mode, config.wandb.name, config.wandb.tags = "offline", "a name", ["one", "two"]
    length = 0
    for number in range(2):
        logger = MetricsLogger(run_dir, config, length)
        found = {"fraction": 0.9 + number / 100, "diagnosis": {"excluded": number}, "note": "none"}
        logger.log(step=number, epoch=number, stage="selection", **found)
        length = logger.length()
        logger.close()
    ended = time.monotonic() + 60  # wandb's own process writes the files
    while sum(kind == "run" for kind, _ in records(run_dir)) < 2 and time.monotonic() < ended:
        time.sleep(0.1)
    return run_dir, config


def test_it_gets_the_whole_config_the_code_and_the_names(logged):
    run_dir, config = logged
    (first, second) = [record.run for kind, record in records(run_dir) if kind == "run"]
    told = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert {key: told[key] for key in config.model_dump()} == json.loads(json.dumps(config.model_dump()))
    assert told["code"] and first.display_name == "a name" and list(first.tags) == ["one", "two"]
    assert first.run_id == second.run_id


def test_selection_rounds_are_numbers_and_a_table_also_after_a_resume(logged):
    run_dir, _ = logged
    rows = [record.history for kind, record in records(run_dir) if kind == "history"]
    last = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in rows[-1].item}
    assert (last["fraction"], last["diagnosis/excluded"]) == (0.91, 1)
    tables = sorted(run_dir.glob("wandb/offline-run-*/files/media/table/*.json"))
    found = json.loads(max(tables, key=lambda path: path.stat().st_mtime_ns).read_text())
    column = found["columns"].index("fraction")
    assert [row[column] for row in found["data"]] == [0.9, 0.91]


def test_flat_names_of_nested_figures():
    assert dict(flat({"a": 1, "b": {"c": {"d": 2}, "e": 3}})) == {"a": 1, "b/c/d": 2, "b/e": 3}


def test_a_line_is_strict_json(tmp_path):
    logger = MetricsLogger(tmp_path, Config(), 0)
    logger.log(step=1, loss=float("nan"), deep={"a": float("inf"), "b": 0.5})
    logger.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "deep": {"a": None, "b": 0.5}}


@pytest.mark.parametrize("length, expected", [(0, b""), (4, b"one\n"), (6, b"one\n"), (99, b"one\ntwo\n")])
def test_whole_lines_before_the_checkpoint_are_kept(tmp_path, length, expected):
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntwo\nthr")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        keep_whole_lines(file, length)
        assert file.tell() == len(expected)  # which the next checkpoint takes for the length
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_the_commit_is_this_projects_or_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert commit() is None


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    """A run that was cut off after its checkpoint: what it logged then is not shown, what it logs anew is."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, length = Config(preset="clip"), 0
    config.tensorboard.enabled = True
    for steps, loss in (((20, 40, 60), 1.0), ((60, 80), 2.0)):
        logger = MetricsLogger(tmp_path, config, length)
        for step in steps:
            logger.log(step=step, epoch=0, stage="clip", loss=loss, eval={"top1": step / 100})
            length = logger.length() if step == 40 else length
        logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (20, 1.0),
        (40, 1.0),
        (60, 2.0),
        (80, 2.0),
    ]
    assert found.Scalars("eval/top1")[-1].value == pytest.approx(0.8)
    assert "stage" not in found.Tags()["scalars"]


def test_a_service_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", init)
    config = Config(preset="default")
    config.wandb.mode = "online"
    with pytest.raises(UserError, match="wandb.mode: online fails here .No API key.*set it to offline") as found:
        MetricsLogger(tmp_path, config)
    assert "\n" not in str(found.value)
