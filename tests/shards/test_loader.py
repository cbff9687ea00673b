"""Batches are a pure function of their number: nothing of the batches before them is read."""

import numpy as np
import pytest

from shards.augment import ImageAugment
from shards.index import build_index
from shards.loader import PlainBatches, Views, batches
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
