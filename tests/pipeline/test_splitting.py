"""A split goes on from the one before it: shards that are scored, the mean of scores, suspicion; and says what is gone."""

import json
import shutil

import numpy as np
import pytest

from pipeline import comm
from pipeline.config import Selection
from pipeline.safety.sample import FOLDS, TEXTURES
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.safety.split import split_pairs
from pipeline.safety.suspicion import Suspicion, weights
from pipeline.training import run as running
from pipeline.training.curriculum import Epoch
from pipeline.training.splitting import mask_for
from pipeline.training.start import Run
from shards.demo import shapes
from shards.errors import UserError
from shards.index import build_index
from shards.masks import SafeMask
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


def lowered_where_they_wait(folder):
    """(scores as they are, lowered by textures in all pairs, in those alone that are risky in a mask, which those are)."""
    run = Run(config(folder, "waiting"))
    weight_FD = np.random.default_rng(0).normal(size=(FOLDS, TEXTURES))
    suspicion, waits_N = (
        Suspicion.of([weights(weight_FD, 0.0)]),
        np.random.default_rng(1).random(run.index.samples) < 0.2,
    )
    unmarked = SafeMask.from_flags(run.index.counts, ~waits_N)
    arguments = run.engine, run.samples, run.views, 16, run.device
    found = [score_all_pairs(*arguments, **more)[0].copy() for more in ({}, {"suspicion": suspicion})]
    return *found, score_all_pairs(*arguments, suspicion=suspicion, unmarked=unmarked)[0].copy(), waits_N


def test_textures_lower_the_scores_of_pairs_that_wait_alone(data):
    for plain_N, all_N, some_N, waits_N in run_ranks(lowered_where_they_wait, 2, data):
        assert (all_N < plain_N).any() and waits_N.any()
        np.testing.assert_allclose(some_N, np.where(waits_N, all_N, plain_N), atol=1e-4)


def suspected():
    """(float32 scores before they were lowered, by how much) of pairs of which every fifth is suspected."""
    rng = np.random.default_rng(0)
    score_N, lowered_N = rng.normal(0, 0.2, 1_000).astype(np.float32), np.zeros(1_000, np.float32)
    lowered_N[::5] = rng.uniform(0, 0.5, 200)
    return score_N, lowered_N


def split_with_suspicion():
    """(flags, share, cut, pairs held back, line) of a split of them."""
    score_N, lowered_N = suspected()
    split = split_pairs(score_N - lowered_N, [600, 0, 400], Selection(first_share=0.9, cap=1.0), 0, lowered_N=lowered_N)
    return split.mask.flags(), split.share, split.cut, split.diagnosis["held_back"], split.line()


def test_suspicion_holds_back_and_lets_nothing_in_instead():
    score_N, lowered_N = suspected()
    cut = np.sort(score_N)[100]
    for flags, share, found, held, line in run_ranks(split_with_suspicion, 2):
        assert cut <= found == (score_N - lowered_N)[flags].min()
        np.testing.assert_array_equal(flags, (score_N >= cut) & (score_N - lowered_N >= cut))
        assert held == 900 - flags.sum() > 20 and share == flags.mean() and f"{held} held back" in line


def masks_of_slow_epochs(folder):
    """Safe pairs of the slow epoch's mask, by (copies, suspicion); None where there is no mask."""
    found = {}
    for copies, suspicion in ((None, 0.0), (1, 0.0), (1, 0.4)):
        name = f"slow{copies}{suspicion}"
        run = Run(config(folder, name, selection__copies=copies, selection__suspicion=suspicion))
        mask = mask_for(run, Epoch(1, "slow", None, None), None)
        found[copies, suspicion] = mask and mask.flags()
    return found


def test_a_slow_epoch_trains_on_no_picture_that_stands_in_too_many_pairs(tmp_path, make_shards):
    paths = make_shards([30, 90])
    paths.append(shutil.copy(paths[0], tmp_path / "again.tar"))
    build_index([str(path) for path in paths], tmp_path / "shapes" / "index")
    (found,) = run_ranks(masks_of_slow_epochs, 1, tmp_path)
    assert found.pop((None, 0.0)) is None
    for flags in found.values():  # so few pairs have no marks
        np.testing.assert_array_equal(flags, np.repeat([False, True, False], [30, 90, 30]))


def change_the_score(folder):
    running.train(config(folder, "other_score", train__epochs=3, selection__score="cosine"))
    running.train(config(folder, "other_score", train__epochs=5, run__accept_changes=True))


def test_the_mean_of_scores_begins_anew_where_the_kind_of_score_was_changed(data):
    run_ranks(change_the_score, 1, data)
    masks = [data / "other_score" / "masks" / f"epoch_{epoch:03d}" / "mask.json" for epoch in (2, 3, 4)]
    made = [json.loads(path.read_text()) for path in masks]
    assert [(meta["score"], meta["mean_of"]) for meta in made] == [("cosine", 1), ("agreement", 1), ("agreement", 2)]


def without_suspicion(folder):
    """What an epoch more says where the last split's suspicion is gone, and whether it has one where the run had none."""
    found = []
    for name, before in (("lost", 0.4), ("switched", 0.0)):
        running.train(config(folder, name, selection__suspicion=before))
        lost = folder / name / "masks" / "epoch_003" / "suspicion.npz"
        if before:
            lost.unlink()
        made = config(folder, name, train__epochs=5, run__accept_changes=True)
        try:
            running.train(made)
            found.append((folder / name / "masks" / "epoch_004" / "suspicion.npz").exists())
        except UserError as error:
            found.append(str(error))
    return found


def test_suspicion_that_is_gone_is_named_and_may_be_switched_on_in_mid_run(data):
    ((message, switched),) = run_ranks(without_suspicion, 1, data)
    assert "suspicion.npz cannot be read" in message and "\n" not in message and switched is True
