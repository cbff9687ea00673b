"""What is under the CLIP loss, told by the pictures and captions of the batches: pairs of the safe set of the last
selection round alone, the same ones after cuts in mid-epoch and on another number of ranks."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.distributed import comm
from pipeline.training import run as running
from pipeline.training.start import make_views
from shards.build.write import write_shards
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.augment import ImageAugment, plain_view
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, cut_off

BEFORE, STEPS = 3, 10  # steps on all pairs before the first round; of an epoch
AS_THEY_ARE = ImageAugment(crop_min=1.0, flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def three_epochs(folder, name, views):
    """Rounds after 3 and after 20 of 30 steps: the first mask holds for more than an epoch."""
    changes = {"unimodal_epochs": 0, "low_rate_epochs": 0, "steps_before_selection": BEFORE, "epochs": 3}
    made = config(folder, f"{name}{views}", **{f"train__{key}": value for key, value in changes.items()})
    made.train.clip_views, made.data.clip_augment, made.data.clip_eda = views, AS_THEY_ARE, 0.0
    made.selection.risky, made.selection.refill, made.selection.every = "skip", True, 2
    made.selection.first_fraction, made.selection.growth = 0.4, 0.1
    return made


def name_of(picture, tokens):
    return picture.numpy().tobytes(), tokens.numpy().tobytes()


def pairs_of(made):
    """{name of a pair as it is: its row}."""
    samples, views = Samples(ShardIndex.load(made.data.index)), make_views(made)
    found = {}
    for row in range(samples.index.samples):
        (shard,), (position,) = samples.index.place(np.array([row]))
        pixels = plain_view(samples.image(int(shard), int(position)), views.size)
        caption = views.tokenize([samples.caption(int(shard), int(position))])
        found[name_of(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), caption[0])] = row
    assert len(found) == samples.index.samples
    return found


def watched(folder, names, cuts):
    """Train with 1 and with 2 views; writes of each step of this start (loss, [rows of each view])."""
    original = running.train_step
    for name, views in product(names, (1, 2)):
        made, steps = three_epochs(folder, name, views), []
        pairs = pairs_of(made)

        def train_step(engine, queues, batch, kind, parts):
            named = [pairs.get(name_of(*one)) for one in zip(batch.images, batch.tokens)]
            steps.append((kind, np.array(named).reshape(views, -1).tolist()))
            assert batch.valid.all()
            return original(engine, queues, batch, kind, parts)

        running.train_step = train_step
        try:
            for number, step in enumerate(cuts):
                cut_off(made, step, on=number % comm.world())
            if not cuts:
                running.train(made)
        finally:
            running.train_step = original
        start = len(list(Path(made.run.dir).glob("steps_*_0.json")))
        comm.barrier()
        Path(made.run.dir, f"steps_{start}_{comm.rank()}.json").write_text(json.dumps(steps))
        comm.barrier()


def steps_of(made):
    """[(loss, [rows of each view, of all ranks])]: the steps of all starts one after another."""
    found = []
    for start in range(len(list(Path(made.run.dir).glob("steps_*_0.json")))):
        ranks = [json.loads(path.read_text()) for path in sorted(Path(made.run.dir).glob(f"steps_{start}_*.json"))]
        for parts in zip(*ranks, strict=True):
            found.append((parts[0][0], [sum(rows, []) for rows in zip(*(rows for _, rows in parts))]))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """240 pairs whose pictures and captions are all different, in shards of uneven sizes; `whole`: runs of one rank
    without a cut; `cut`: runs cut off by 2 ranks in mid-epoch of the first and of the second mask, finished by one."""
    folder, paths = tmp_path_factory.mktemp("rows"), []
    for shard, count in enumerate((120, 7, 113)):
        samples = [
            {"__key__": f"{i}", "png": picture([shard, i]), "txt": f"thing {i} of {shard}"} for i in range(count)
        ]
        paths += write_shards(samples, folder / str(shard), count)
    build_index([str(path) for path in paths], folder / "shapes" / "index")
    run_ranks(watched, 2, folder, ["cut"], (6, 17))
    run_ranks(watched, 1, folder, ["cut", "whole"], ())
    return folder


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", ["whole", "cut"])
def test_only_safe_pairs_of_the_last_round_are_under_the_clip_loss(data, name, views):
    made = three_epochs(data, name, views)
    steps = steps_of(made)
    assert [kind for kind, _ in steps] == ["clip"] * 3 * STEPS
    masks = {epoch: SafeMask.load(f"{made.run.dir}/masks/epoch_{epoch:03d}")[0].flags() for epoch in (1, 3)}
    assert [int(flags.sum()) for flags in masks.values()] == [96, 144]
    trained = {epoch: set() for epoch in (0, 1, 3)}
    for step, (_, rows) in enumerate(steps):
        epoch = 0 if step < BEFORE else 1 if step < 2 * STEPS else 3
        assert len(rows) == views and len(rows[0]) == 24
        for rows_B in rows:  # each view is of the same pairs, and of pairs that are what they were
            assert rows_B == rows[0] and None not in rows_B
        trained[epoch].update(rows[0])
    assert not masks[1][list(trained[0])].all()  # before the first round: of all pairs
    for epoch, flags in masks.items():
        assert flags[list(trained[epoch])].all()
        assert trained[epoch] == set(np.flatnonzero(flags))


@pytest.mark.parametrize("views", [1, 2])
def test_cuts_and_another_number_of_ranks_change_no_batch(data, views):
    whole, cut = (steps_of(three_epochs(data, name, views)) for name in ("whole", "cut"))
    assert [sorted(rows[0]) for _, rows in whole] == [sorted(rows[0]) for _, rows in cut]
