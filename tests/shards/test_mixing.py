"""Views mixed with their neighbours: the same on any number of ranks, only where it was drawn, and never with what could not be read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.training.curriculum import Step
from shards.augment import ImageAugment
from shards.index import build_index
from shards.loader import TrainBatches, View, Views
from shards.mixing import FAINT, LEAST, MOST, Mixing, mixed
from shards.plan import EpochPlan
from shards.samples import Samples

SIDE = 20


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_a_view_has_its_own_pixels_its_neighbours_in_a_square_and_a_mean_of_both_elsewhere(seed, pairs, mix, paste):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (2 * pairs, 3, SIDE, SIDE), np.uint8))
    drawn = [Mixing(mix, paste).draw(rng) for _ in range(2 * pairs)]
    valid = torch.from_numpy(rng.random(2 * pairs) < 0.8)
    found = mixed(images, torch.tensor(drawn, dtype=torch.float32), valid)
    for row, (strength, left, top, side) in enumerate(drawn):
        assert 0 <= strength <= FAINT and (side == 0 or LEAST <= side <= MOST) and max(left, top) + side <= 1
        own, other = images[row].double(), images[row ^ 1].double()
        expected = own + strength * (other - own)
        across, down = ((np.arange(SIDE) + 0.5) / SIDE - np.float32(at) for at in (left, top))
        square = np.outer((0 <= down) & (down < np.float32(side)), (0 <= across) & (across < np.float32(side)))
        expected = torch.where(torch.from_numpy(square), other, expected) if valid[row ^ 1] else own
        edge = np.outer(*(np.abs(at - np.float32(side)) < 1e-6 for at in (down, across)))  # where rounding decides
        assert ((found[row] - expected).abs() <= 0.501)[:, ~edge].all()


def test_how_often_is_as_asked():
    rng = np.random.default_rng(0)
    drawn = np.array([Mixing(0.3, 0.7).draw(rng) for _ in range(2000)])
    assert abs((drawn[:, 0] > 0).mean() - 0.3) < 0.04 and abs((drawn[:, 3] > 0).mean() - 0.7) < 0.04
    assert not Mixing() and Mixing(mix=0.1) and Mixing(paste=0.1)


def test_it_stays_on_the_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = [torch.zeros(shape, device="cuda") for shape in ((4, 3, 8, 8), (4, 4), (4,))]
        assert mixed(parts[0].to(torch.uint8), parts[1], parts[2].bool()).device.type == "cuda"


@pytest.mark.parametrize("workers_device", [False, True])
def test_mixed_batches_are_the_same_at_any_world_size(make_shards, tmp_path, workers_device):
    samples = Samples(build_index([str(path) for path in make_shards([24, 24])], tmp_path / "index"))
    plan = EpochPlan(samples.index.counts, seed=0, epoch=0, view="all", batch_size=8, streams=4)

    def epoch(rank, world, mixing):
        views = Views(
            16,
            lambda captions: torch.zeros(len(captions), 1),
            {"clip": (View(ImageAugment()),)},
            workers_device,
            clip_mixing=mixing,
        )
        steps = [Step("clip", "all", plan, number) for number in range(plan.steps)]
        data = TrainBatches(samples, steps, views, seed=0, epoch=0, rank=rank, world=world)
        return [data[number].to("cpu").images for number in range(len(data))]

    whole, halves = (
        epoch(0, 1, Mixing(0.5, 0.5)),
        list(zip(*(epoch(rank, 2, Mixing(0.5, 0.5)) for rank in range(2)))),
    )
    assert all((one == torch.cat(two)).all() for one, two in zip(whole, halves))
    changed = [(one != plain).flatten(1).any(1) for one, plain in zip(whole, epoch(0, 1, Mixing()))]
    assert 0.4 < torch.cat(changed).float().mean() < 1
