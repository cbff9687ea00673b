"""A selection round resumes with the shards that are not scored yet, leaves out excluded pairs, and names a missing
mask."""

import shutil

import numpy as np
import pytest

from pipeline.config.schema import Selection
from pipeline.distributed import comm
from pipeline.safety.round import mask_folder, select_pairs
from pipeline.safety.score_files import ScoreFiles, load_scores
from pipeline.safety.scoring import assign_shards, score_all_pairs
from pipeline.training import run as running
from pipeline.training.start import Run
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection_round")
    shapes(folder / "shapes", pairs=240, test=36)
    return folder


def interrupted_in_scoring(folder):
    """(cosines, those of a scoring that was interrupted and resumed, shards done when it was interrupted, passes after
    it, files at the end)."""
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
    done = files.parts().done()
    comm.barrier()
    resumed, _ = score_all_pairs(*arguments, files, each_round)
    files.conclude()
    again, _ = score_all_pairs(*arguments, files, each_round)
    np.testing.assert_array_equal(again, resumed)
    comm.barrier()
    names = sorted(path.name for path in (folder / "scores").iterdir())
    return whole, resumed, done, len(passes) - 5, names


def test_scoring_resumes_with_the_shards_that_are_not_scored_yet(tmp_path, make_shards):
    build_index([str(path) for path in make_shards([50, 0, 7, 33, 90])], tmp_path / "uneven")
    for whole, resumed, done, passes, names in run_ranks(interrupted_in_scoring, 2, tmp_path):
        np.testing.assert_array_equal(whole, resumed)
        # 8 passes in all: shard 4 on one rank (6), the others on the other (4 + 1 + 3). Interrupted after 5, it needs
        # no 8 more.
        assert done == [0, 2] and passes == 6 and names == ["00000-00002.parquet", "00003-00004.parquet", "made.json"]


def test_shards_that_are_only_read_are_shared_out_too():
    assert [len(some) for some in assign_shards([50] * 100, 4, range(100))] == [25] * 4
    first, second = assign_shards([100] * 10, 2, range(8))
    assert list(first) == list(range(9)) and list(second) == [9]


def rounds_with_a_guard(folder):
    """At each selection round of a run: the safe set, and which pairs have a score; first whole, then of one that was
    cut off after a round."""
    found = []
    for name, epochs in (("whole", (4,)), ("interrupted", (3, 4))):
        for number in epochs:
            made = config(folder, name, train__epochs=number, run__accept_changes=True)
            made.guards = {"duplicates": {"max_pairs": 1}}
            running.train(made)
        index = ShardIndex.load(made.data.index)
        folders = [mask_folder(made.run.dir, epoch) for epoch in (2, 3)]
        rounds = [(SafeMask.load(where)[0].flags(), ~np.isnan(load_scores(where, index.counts))) for where in folders]
        found.append(rounds)
    return found


def test_what_a_guard_excludes_is_in_no_safe_set_of_any_round(tmp_path, make_shards):
    paths = make_shards([30, 90])
    paths.append(shutil.copy(paths[0], tmp_path / "copy.tar"))
    build_index([str(path) for path in paths], tmp_path / "shapes" / "index")
    kept_N = np.repeat([False, True, False], [30, 90, 30])
    for whole, interrupted in run_ranks(rounds_with_a_guard, 2, tmp_path):
        for (safe_N, scored_N), (resumed_safe_N, _) in zip(whole, interrupted, strict=True):
            assert safe_N.any() and not safe_N[~kept_N].any()
            np.testing.assert_array_equal(scored_N, kept_N)
        np.testing.assert_array_equal(whole[0][0], interrupted[0][0])


def without_the_mask_before(folder):
    """(rounds whose scores are kept, what the last epoch says where the mask of the round before it is missing)."""
    running.train(config(folder, "lost", train__epochs=4, run__keep=1))
    scored = sorted(path.parent.name for path in (folder / "lost" / "masks").glob("epoch_*/scores"))
    shutil.rmtree(folder / "lost" / "masks" / "epoch_003")
    try:
        running.train(config(folder, "lost", train__epochs=5, run__accept_changes=True))
    except UserError as error:
        return scored, str(error)


def test_scores_of_the_last_rounds_are_kept_and_a_missing_mask_is_named(data):
    ((scored, message),) = run_ranks(without_the_mask_before, 1, data)
    assert scored == ["epoch_003"]
    assert "masks/epoch_003 is missing" in message and "\n" not in message


def test_the_fraction_is_one_of_the_pairs_that_no_guard_excludes():
    score_N = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    score_N[:20] = np.nan
    selected = select_pairs(score_N, [60, 40], Selection(first_fraction=0.5), 0, excluded=20)
    assert (
        selected.mask.flags().sum() == 40 and selected.diagnosis["excluded"] == 20 and "20 excluded" in selected.line()
    )
    assert selected.threshold == np.sort(score_N[20:])[40]
