"""The sample that guards learn on is scored before all others, in files that a second start reads. No picture is
decoded twice for the guards, wherever the first round is cut off."""

import os
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.guards import excluded, make_guards, sample
from pipeline.guards.features import FEATURES, take
from pipeline.guards.sample import Sample
from pipeline.safety.score_files import ScoreFiles
from pipeline.safety.scoring import NO_ROWS, Reading, score_all_pairs
from pipeline.training import run as running
from pipeline.training import selection_round
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.build.shapes import shapes
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.loader import PlainBatches
from tests.helpers.models import MODEL
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config, weights

PAIRS, CONTROLS, CHUNK, BATCH = 240, 13, 40, 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    shapes(folder / "shapes", pairs=PAIRS, test=36)
    return folder


def reading_of(folder):
    made = Config()
    made.model.config = MODEL
    torch.manual_seed(0)
    towers = Towers(build_model({"config": MODEL}), *pixel_stats())
    samples = Samples(ShardIndex.load(folder / "shapes" / "index"))
    return Reading(towers, samples, make_views(made), BATCH, torch.device("cpu"))


def scored(folder, name, interrupted=False):
    """What a sample of 150 pairs knows of its pairs; first stopped after 4 passes, if asked for."""
    sample.CHUNK = CHUNK
    reading, passes = reading_of(folder), []

    def each_round(done, rounds):
        passes.append(done)
        if interrupted and len(passes) == 4:
            raise KeyboardInterrupt

    made = Sample(folder / name, reading.samples, 150, FEATURES, 7)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            made.score(reading, {"step": 5}, each_round)
        comm.barrier()
    made.score(reading, {"step": 5}, each_round)
    again = len(passes)
    made.score(reading, {"step": 5}, each_round)
    assert len(passes) == again
    parts = made.scored(0, PAIRS)
    rows = np.concatenate([part.row_B for part in parts])
    seen = {feature: torch.cat([part.numbers[feature] for part in parts]).numpy() for feature in FEATURES}
    return made.row_K, made.row_R, made.cos_R, rows, seen, made.features(made.row_K[3:90:7], list(FEATURES)), again


def same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a if isinstance(a, dict) else [None]:
            np.testing.assert_array_equal(a[name] if name else a, b[name] if name else b)


def test_a_sample_is_the_same_on_two_processes_and_after_an_interruption(data):
    ((*one, passes),) = run_ranks(scored, 1, data, "one")
    assert passes == 11  # chunks of 40, 40, 40 and 30 pairs
    for *two, passes in run_ranks(scored, 2, data, "two"):
        same(two, one)
        assert passes == 6
    for *resumed, passes in run_ranks(scored, 2, data, "resumed", True):
        same(resumed, one)
        assert passes == 4 + 3  # one chunk of each rank is done


def test_no_file_that_other_hosts_write_is_asked_for_before_it_is_there(data, monkeypatch):
    """An NFS client that has looked for a file in vain goes on for up to a minute to say that there is none."""
    missed, look, stat = [], os.path.exists, os.stat

    def seen(call, path, *args, **more):
        if str(path).endswith("0.parquet") and not look(path):
            missed.append(path)
        return call(path, *args, **more)

    monkeypatch.setattr(os, "stat", partial(seen, stat))
    monkeypatch.setattr(os.path, "exists", partial(seen, look))
    made = Sample(data / "asked", reading_of(data).samples, 10, ("hash",), 7)
    assert made.claim({"step": 5}) == set()
    made.path(0).touch()
    assert made.claim({"step": 5}) == {0} and not missed


def test_its_scores_and_features_are_those_of_the_pictures(data):
    ((row_K, row_R, cos_R, rows, seen, some, _),) = run_ranks(scored, 1, data, "right")
    reading = reading_of(data)
    cos_N, _ = score_all_pairs(*reading)
    assert sorted(row_R) == row_K.tolist() == rows.tolist() and len(set(row_K)) == 150
    assert row_R.tolist() != row_K.tolist()
    np.testing.assert_allclose(cos_R, cos_N[row_R], atol=1e-6)
    images = PlainBatches(reading.samples, [(row_K, row_K)], reading.views)[0].images
    for name, feature in take(images, FEATURES).items():
        np.testing.assert_array_equal(seen[name], feature.numpy())
        np.testing.assert_array_equal(some[name], feature.numpy()[3:90:7])


class Died(Exception):
    pass


# Where the first round dies: after the sample is scored, all pairs are, the guards' masks are saved, the score files of
# ranks are merged, the mask is made.
DEATHS = (
    (excluded.GuardNumbers, "begin"),
    (excluded.GuardNumbers, "masks"),
    (ScoreFiles, "conclude"),
    (selection_round, "select_pairs"),
    (selection_round, "save_round"),
)


def run_with_guards(folder, name, deaths=False):
    """(pictures decoded by the rounds, number of rounds, safe set of the first one, weights at the end)."""
    sample.CHUNK, scored = CHUNK, 0
    job, sampled = PlainBatches.job, Sample.__init__

    def counted(self, i):
        nonlocal scored
        scored += len(self.batches[i][0])
        return job(self, i)

    PlainBatches.job = counted
    Sample.__init__ = lambda self, folder, samples, size, *rest: sampled(self, folder, samples, 150, *rest)
    made = config(folder, name, selection__negative_controls=CONTROLS)
    made.guards = {"duplicates": {"max_pairs": 2}, "trigger_clusters": {"sample": 64, "low": 0.5, "least": 3}}
    for owner, function in DEATHS if deaths else ():
        lives = getattr(owner, function)

        def dies(*args):
            raise Died

        setattr(owner, function, dies)
        with pytest.raises(Died):
            running.train(made)
        setattr(owner, function, lives)
    running.train(made)
    masks = sorted((folder / name / "masks").glob("epoch_*/mask.json"))
    assert not (folder / name / "masks" / "guards" / "sample").exists()
    return scored, len(masks), SafeMask.load(masks[0].parent)[0].flags(), weights(made)


def test_a_round_decodes_each_picture_once_whatever_dies(data):
    ((scored, rounds, safe_N, weight),) = run_ranks(run_with_guards, 1, data, "whole")
    assert rounds == 2 and scored == rounds * (PAIRS + CONTROLS)
    ((scored, _, resumed_N, resumed),) = run_ranks(run_with_guards, 1, data, "died", True)
    assert scored == rounds * PAIRS + (rounds + len(DEATHS)) * CONTROLS and resumed == weight
    np.testing.assert_array_equal(safe_N, resumed_N)
    found = run_ranks(run_with_guards, 2, data, "two")
    assert sum(scored for scored, *_ in found) == rounds * (PAIRS + CONTROLS)


def found_where_no_score_is_low(folder):
    """What guards find where more pairs than the lowest fraction have the lowest score, and what is left of none."""
    made, found = Sample(folder / "equal", (reading := reading_of(folder)).samples, 150, FEATURES, 7), []
    made.score(reading, {"step": 5})
    made.cos_R[made.cos_R < np.median(made.cos_R)] = -1
    for name in ("trigger_clusters", "trigger_classifier"):
        (guard,) = make_guards({name: {}})
        assert not len(made.low_and_high(0.1, 64, reading.device)[0])
        found.append(guard.found_in(made, reading.device))
    return found, {name: feature.shape for name, feature in made.features(NO_ROWS, list(FEATURES)).items()}


def test_guards_find_nothing_where_no_score_is_low(data):
    ((found, shapes),) = run_ranks(found_where_no_score_is_low, 1, data)
    assert found == [[], None] and shapes["hash"] == (0,) and shapes["pixels"] == (0, 768)
