"""Reading processes live on from one data set to the next, and are sent no order and no mask."""

import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.training.curriculum import Step
from shards.index.build_index import build_index
from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.augment import ImageAugment
from shards.views.batch import View, Views
from shards.views.loader import PlainBatches, TrainBatches
from shards.views.readers import Readers, batches

COUNT = 40


def tokenize(captions):
    return torch.tensor([[len(caption)] for caption in captions])


@pytest.fixture
def samples(make_shards, tmp_path):
    return Samples(build_index([str(path) for path in make_shards([COUNT, COUNT])], tmp_path / "index"))


VIEWS = Views(16, tokenize, {"clip": (View(ImageAugment()),)})


def epoch(samples, number, mask=None):
    view, counts = ("safe", mask.counts("safe")) if mask else ("all", samples.index.counts)
    plan = EpochPlan(counts, seed=0, epoch=number, view=view, batch_size=8, streams=4)
    steps = [Step("clip", view, plan, step, mask=mask) for step in range(plan.steps)]
    return TrainBatches(samples, steps, VIEWS, seed=0, epoch=number)


def contents(reading):
    return [(batch.rows.tolist(), batch.images, batch.tokens) for batch in reading]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for (rows, images, tokens), (other_rows, other_images, other_tokens) in zip(one, other):
        assert rows == other_rows and torch.equal(images, other_images) and torch.equal(tokens, other_tokens)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_data_set_after_another_is_read_as_by_processes_of_its_own(samples, workers):
    mask = SafeMask.from_flags(samples.index.counts, np.arange(2 * COUNT) % 3 > 0)
    rows = [(range(first, first + 10),) * 2 for first in range(0, 2 * COUNT, 10)]
    as_seen = replace(VIEWS, scored_as=(0, 5))
    data_sets = [epoch(samples, 0), PlainBatches(samples, rows, VIEWS), epoch(samples, 1, mask)]
    data_sets += [PlainBatches(samples, rows, as_seen), PlainBatches(samples.scattered(), rows, VIEWS)]
    readers, processes = Readers(samples, VIEWS, workers), set()
    for data in data_sets:
        next(readers.batches(data))  # and no more: it ends when the next is begun
        assert_same(contents(readers.batches(data)), contents(batches(data)))
        assert_same(contents(readers.batches(data, 3)), contents(batches(data))[3:])
        processes |= {child.pid for child in multiprocessing.active_children()}
    assert len(processes) == workers  # those of scattered samples have ended


def test_a_job_is_small_whatever_the_mask(samples):
    flags = np.ones(2 * COUNT, bool)
    job = epoch(samples, 0, SafeMask.from_flags(samples.index.counts, flags)).job(2)
    large = SafeMask(np.full(2, 1 << 20), np.full(1 << 18, 255, np.uint8))
    assert len(pickle.dumps(epoch(samples, 0, large).job(2))) < len(pickle.dumps(job)) + 100 < 2_000
