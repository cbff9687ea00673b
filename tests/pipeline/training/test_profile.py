"""train.profile: ten steps of rank 0."""

import gzip
import json

import pytest
import torch

from pipeline.training import profile
from pipeline.training.profile import STEPS, WAIT, WARM, Profile


def steps(profiled, count):
    for _ in range(count):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiled.step()


def test_ten_steps_are_traced_and_told_in_a_table(tmp_path):
    steps(Profile(tmp_path, True), WAIT + WARM + STEPS + 5)
    events = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == STEPS == 10
    (line,) = [line for line in (tmp_path / "profile" / "table.txt").read_text().splitlines() if "aten::mm " in line]
    assert line.split()[-1] == "10"


@pytest.mark.parametrize("enabled, rank0, count", [(False, True, 30), (True, False, 30), (True, True, 5)])
def test_nothing_is_written_otherwise(tmp_path, monkeypatch, enabled, rank0, count):
    monkeypatch.setattr(profile.comm, "is_rank0", lambda: rank0)
    profiled = Profile(tmp_path, enabled)
    steps(profiled, count)
    if profiled.profiler:
        profiled.profiler.stop()
    assert list(tmp_path.iterdir()) == []
