"""Figures of an epoch, by a clock that the test sets."""

import pytest

from pipeline.training import meter as meters
from pipeline.training.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    return now


def test_figures_of_an_epoch_with_steps_of_one_and_two_views(clock, monkeypatch):
    monkeypatch.setattr(meters.comm, "world", lambda: 4)
    meter = Meter(total=10, first=2, view_seconds=0.01)  # the peak is 100 views a second
    meter.step(80)
    meter.step(40, views=2)
    meter.waited = 1.0
    clock[0] += 4.0
    figures = meter.figures()
    assert figures.pop("memory_gb") > 0
    assert figures == {"samples_per_s": 30.0, "samples_per_s_per_gpu": 7.5, "data_wait": 0.25, "mfu": 0.4}
    assert meter.done == 4
    line = meter.line(steps_left=30)
    for words in ("30 samples/s (8 a process)", "data  25%", "MFU 40%", "ETA 0:01:00"):
        assert words in line


def test_without_a_known_peak_nothing_is_said_of_it(clock):
    meter = Meter(total=10)
    meter.step(8)
    clock[0] += 1.0
    assert "mfu" not in meter.figures() and "MFU" not in meter.line(9) and "a GPU" not in meter.line(9)


def test_the_memory_peak_grows_with_what_a_process_holds():
    before = meters.memory_peak()
    held = bytearray(b"x") * (before + 50_000_000)
    assert meters.memory_peak() >= len(held) > before
