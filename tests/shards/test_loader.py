"""Batches are a pure function of their number: nothing of the batches before them is read."""

import numpy as np
import pytest

from shards.augment import ImageAugment
from shards.index import build_index
from shards.loader import PlainBatches, TrainBatches, Views, batches
from shards.plan import EpochPlan
from shards.samples import Samples

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
    views = Views(16, tokenize, ImageAugment(), None, 0.0, 0.0)
    found = [batch.rows for batch in batches(PlainBatches(samples, todo, views), start)]
    expected = np.arange(2 * COUNT)[start * SIZE :]
    assert np.array_equal(np.concatenate([*found, []]), expected)
    assert len(read) == 2 * len(expected)  # a picture and a caption of each


class Step:
    """A step of an epoch over all pairs, as pipeline.training.curriculum.Step."""

    loss, view, lap, mask = "clip", "all", 0, None

    def __init__(self, plan, number):
        self.plan, self.number = plan, number


def epoch_of(samples, repeats, rank=0, world=1):
    """{(row, again): picture} of one rank's rows in an epoch."""
    plan = EpochPlan(samples.index.counts, seed=0, epoch=0, view="all", batch_size=8, streams=4, repeats_S=repeats)
    steps = [Step(plan, number) for number in range(plan.steps)]
    data = TrainBatches(
        samples, steps, Views(16, tokenize, ImageAugment(), None, 0.0, 0.0), seed=0, epoch=0, rank=rank, world=world
    )
    seen = {}
    for number in range(len(data)):
        batch, again_B = data[number], plan.batch(number, rank, world)[2]
        for row, again, image in zip(batch.rows.tolist(), again_B.tolist(), batch.images.numpy()):
            assert (row, again) not in seen
            seen[row, again] = image
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
