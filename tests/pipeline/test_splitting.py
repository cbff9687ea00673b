"""A split goes on with the shards that are scored, leaves out what guards exclude, and says what is gone."""

import shutil

import numpy as np
import pytest

from pipeline import comm
from pipeline.config import Selection
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.safety.split import split_pairs
from pipeline.training import run as running
from pipeline.training.curriculum import Epoch
from pipeline.training.splitting import mask_for
from pipeline.training.start import Run
from shards.demo import shapes
from shards.errors import UserError
from shards.index import build_index
from tests.pipeline.test_resume import config
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splitting")
    shapes(folder / "shapes", pairs=240, test=36)
    return folder


def cut_off_in_scoring(folder):
    """(cosines, those of a scoring that was cut off and went on, shards done at the cut, passes after it, shards done at another step)."""
    made = config(folder, "scoring", data__index=str(folder / "uneven"), train__batch_size=8)
    run = Run(made)
    files = ScoreFiles(folder / "scores", run.index, step=5)
    passes = []

    def each_round(done, rounds):
        passes.append(done)
        if len(passes) == 5:
            raise KeyboardInterrupt

    arguments = run.engine, run.samples, run.views, 16, run.device, 0
    whole, _ = score_all_pairs(*arguments)
    with pytest.raises(KeyboardInterrupt):
        score_all_pairs(*arguments, files, each_round)
    comm.barrier()
    done = files.done()
    comm.barrier()
    resumed, _ = score_all_pairs(*arguments, files, each_round)
    return whole, resumed, done, len(passes) - 5, ScoreFiles(folder / "scores", run.index, step=6).done()


def test_scoring_goes_on_with_the_shards_that_are_not_scored_yet(tmp_path, make_shards):
    build_index([str(path) for path in make_shards([50, 0, 7, 33, 90])], tmp_path / "uneven")
    for whole, resumed, done, passes, other_step in run_ranks(cut_off_in_scoring, 2, tmp_path):
        np.testing.assert_array_equal(whole, resumed)
        # 8 passes in all: shard 4 on one rank (6), the others on the other (4 + 1 + 3). Cut off after 5, it needs no 8 more.
        assert done == [0, 2] and passes == 6 and other_step == []


def masks_of_the_warm_up(folder):
    """Safe pairs of the low-rate epoch's mask without guards and with one; None where there is no mask."""
    found = []
    for name, guards in (("none", {}), ("duplicates", {"duplicates": {"max_pairs": 1}})):
        made = config(folder, name)
        made.guards = guards
        mask = mask_for(Run(made), Epoch(1, "slow", None, None), None)
        found.append(mask and mask.flags())
    return found


def test_a_low_rate_epoch_trains_on_nothing_that_a_guard_excludes(tmp_path, make_shards):
    paths = make_shards([30, 90])
    paths.append(shutil.copy(paths[0], tmp_path / "again.tar"))
    build_index([str(path) for path in paths], tmp_path / "shapes" / "index")
    ((without, flags),) = run_ranks(masks_of_the_warm_up, 1, tmp_path)
    assert without is None
    np.testing.assert_array_equal(flags, np.repeat([False, True, False], [30, 90, 30]))


def without_the_mask_before(folder):
    """What the last epoch says where the mask of the split before it is gone."""
    running.train(config(folder, "lost", train__epochs=4))
    shutil.rmtree(folder / "lost" / "masks" / "epoch_003")
    try:
        running.train(config(folder, "lost", train__epochs=5, run__accept_changes=True))
    except UserError as error:
        return str(error)


def test_a_mask_that_is_gone_is_named(data):
    (message,) = run_ranks(without_the_mask_before, 1, data)
    assert "masks/epoch_003 is gone" in message and "\n" not in message


def test_the_share_is_one_of_the_pairs_that_no_guard_excludes():
    score_N = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    score_N[:20] = np.nan
    split = split_pairs(score_N, [60, 40], Selection(first_share=0.5), 0, excluded=20)
    assert split.mask.flags().sum() == 40 and split.diagnosis["excluded"] == 20 and "20 excluded" in split.line()
    assert split.cut == np.sort(score_N[20:])[40]
