"""Batches are a pure function of their number: nothing of the batches before them is read."""

import multiprocessing

import numpy as np
import pytest

from pipeline.training.curriculum import Step
from shards.index.build_index import build_index
from shards.order.plan import EpochPlan
from shards.samples import samples as samples_module
from shards.samples.samples import Samples
from shards.views.augment import ImageAugment
from shards.views.batch import View, Views
from shards.views.eda import Eda
from shards.views.loader import PlainBatches, TrainBatches
from shards.views.readers import batches

COUNT, SIZE = 40, 4


def tokenize(captions):
    import torch

    return torch.tensor([[len(caption)] for caption in captions])


@pytest.fixture
def samples(make_shards, tmp_path):
    return Samples(build_index([str(path) for path in make_shards([COUNT, COUNT])], tmp_path / "index"))


@pytest.mark.parametrize("start", [0, 1, 9, 19, 20])
def test_starting_at_a_batch_reads_that_batch_and_later_ones_only(samples, start, monkeypatch):
    todo = [(range(first, first + SIZE),) * 2 for first in range(0, 2 * COUNT, SIZE)]
    read, original = [], samples.reader.read
    monkeypatch.setattr(samples.reader, "read", lambda *where: (read.append(where), original(*where))[1])
    views = Views(16, tokenize, {})
    found = [batch.rows for batch in batches(PlainBatches(samples, todo, views), start)]
    expected = np.arange(2 * COUNT)[start * SIZE :]
    assert np.array_equal(np.concatenate([*found, []]), expected)
    assert len(read) == 2 * len(expected)  # a picture and a caption of each


def epoch_of(samples, repetitions, rank=0, world=1):
    """{(row, repetition): picture} of one rank's rows in an epoch."""
    plan = EpochPlan(
        samples.index.counts, seed=0, epoch=0, view="all", batch_size=8, streams=4, repetitions_S=repetitions
    )
    steps = [Step("clip", "all", plan, number) for number in range(plan.steps)]
    data = TrainBatches(
        samples, steps, Views(16, tokenize, {"clip": (View(ImageAugment()),)}), seed=0, epoch=0, rank=rank, world=world
    )
    seen = {}
    for number in range(len(data)):
        batch, repetition_B = data[number], plan.batch(number, rank, world)[2]
        for row, repetition, image in zip(batch.rows.tolist(), repetition_B.tolist(), batch.images.numpy()):
            assert (row, repetition) not in seen
            seen[row, repetition] = image
    return seen


def test_a_sample_that_is_seen_twice_is_seen_in_two_views(samples):
    once, twice = epoch_of(samples, [1, 1]), epoch_of(samples, [2, 1])
    assert sorted(twice) == sorted(
        [(row, k) for row in range(COUNT) for k in range(2)] + [(COUNT + i, 0) for i in range(COUNT)]
    )
    assert all(np.array_equal(once[row, 0], twice[row, 0]) for row in range(2 * COUNT))
    same = sum(np.array_equal(twice[row, 0], twice[row, 1]) for row in range(COUNT))
    assert same == 0
    parts = [epoch_of(samples, [2, 1], rank, 2) for rank in range(2)]
    assert all(np.array_equal({**parts[0], **parts[1]}[key], picture) for key, picture in twice.items())


def epoch(samples, on_device=False, workers=0, rank=0, world=1):
    """[Batch] of one unimodal epoch."""
    view = View(ImageAugment(crop_min=0.5), Eda(0.1, "table"))
    views = Views(16, tokenize, {"unimodal": (view, view)}, on_device)
    plan = EpochPlan(samples.index.counts, seed=1, epoch=2, view="all", batch_size=SIZE, streams=2, window=16)
    steps = [Step("unimodal", "all", plan, number) for number in range(plan.steps)]
    return list(batches(TrainBatches(samples, steps, views, seed=1, epoch=2, rank=rank, world=world), workers=workers))


def test_both_views_come_from_one_read_and_one_decode(samples, monkeypatch):
    decoded, original = [], samples_module.decode_image
    monkeypatch.setattr(samples_module, "decode_image", lambda *a: (decoded.append(a), original(*a))[1])
    found = epoch(samples)
    assert len(decoded) == sum(len(batch.rows) for batch in found) == 2 * COUNT
    for batch in found:
        first, second = batch.images.chunk(2)
        assert len(batch.images) == 2 * SIZE and not (first == second).all((1, 2, 3)).any()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_row_is_the_same_in_any_worker_and_on_any_rank(samples, on_device):
    alone = epoch(samples, on_device)
    for number, batch in enumerate(epoch(samples, on_device, workers=2)):
        assert (batch.images == alone[number].images).all() and (batch.tokens == alone[number].tokens).all()
    half = SIZE // 2
    for number, batch in enumerate(epoch(samples, on_device, rank=1, world=2)):
        whole = alone[number].to("cpu").images.chunk(2)
        assert (batch.to("cpu").images == np.concatenate([view[half:] for view in whole])).all()


def test_colours_changed_on_the_device_are_those_of_the_worker(samples):
    off = []
    for worker, device in zip(epoch(samples), epoch(samples, on_device=True)):
        assert worker.colours is None and device.colours.shape[0] == 2 * SIZE
        moved = device.to("cpu")
        assert moved.colours is None and (moved.tokens == worker.tokens).all()
        off.append((moved.images.int() - worker.images.int()).abs().float().mean())
    assert np.mean(off) < 2 < np.mean([(device.images.float() - worker.images).abs().mean()])


def test_reading_processes_share_what_they_read_with(samples):
    """Whatever the start method of the program: what cannot be sent to a process is there in it."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        views = Views(16, lambda captions: tokenize(captions), {})
        found = list(batches(PlainBatches(samples, [(range(4), range(4))], views), workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert found[0].rows.tolist() == [0, 1, 2, 3]
