"""How well scores and masks tell poison from honest pairs, counted by hand."""

import numpy as np
import pytest

from pipeline.config.schema import Config
from pipeline.evaluation.selection_quality import (
    Round,
    poison_fractions,
    ranks,
    score_quality,
    selection_quality,
    selection_rounds,
    trained_on,
)
from pipeline.safety.score_files import ScoreFiles
from shards.index.build_index import build_index
from shards.order.safe_mask import SafeMask

NAN = np.nan


class Poisoned:
    """What a manifest says: two attacks and a decoy, in shards of 4 and 3 pairs."""

    kinds = {"patch": {}, "blend": {}}
    rows = [{"shard": 0, "position": 1, "kind": "patch"}, {"shard": 1, "position": 0, "kind": "blend"}]
    decoys = [{"shard": 1, "position": 2, "kind": "patch_decoy"}]


@pytest.fixture
def index(tmp_path, make_shards):
    return build_index([str(path) for path in make_shards([4, 3])], tmp_path / "index")


def kept(folder, index, rows):
    mask = SafeMask.from_flags(index.counts, np.isin(np.arange(7), rows))
    mask.save(folder, {"fingerprint": index.fingerprint})
    return mask


def quality(honest, poison):
    """score_quality of two lists of scores."""
    score_N = np.array([*honest, *poison], np.float32)
    honest_N = np.arange(len(score_N)) < len(honest)
    return score_quality(ranks(score_N), honest_N, np.flatnonzero(~honest_N))


def test_the_threshold_of_full_recall_stands_at_the_highest_poison():
    found = quality([0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.25])
    # 0.1 and 0.2 score below 0.25; of the 10 pairs (honest, poison) 8 are in order.
    assert found == pytest.approx({"auroc": 0.8, "fpr_at_full_recall": 0.4, "fpr_at_99_recall": 0.4})


def test_an_honest_pair_that_ties_with_the_threshold_is_left_out():
    assert quality([0.2, 0.3], [0.2]) == pytest.approx(
        {"auroc": 0.75, "fpr_at_full_recall": 0.5, "fpr_at_99_recall": 0.5}
    )


def test_what_has_no_score_ranks_lowest():
    found = quality([NAN, 0.2, 0.3, 0.4], [NAN, 0.1])
    # Honest NaN ties with poison NaN and is below 0.1: 6 and a half pairs of 8 in order; a threshold at 0.1 leaves it
    # out.
    assert found == pytest.approx({"auroc": 6.5 / 8, "fpr_at_full_recall": 0.25, "fpr_at_99_recall": 0.25})
    assert quality([0.2, NAN, 0.3], [NAN, NAN])["fpr_at_full_recall"] == pytest.approx(1 / 3)


def test_one_poison_of_a_hundred_may_score_above_the_threshold_of_99_percent():
    honest, poison = np.linspace(0.5, 1.0, 50), np.r_[np.linspace(0, 0.1, 99), 0.755]
    found = quality(honest, poison)
    assert found["fpr_at_99_recall"] == 0 and found["fpr_at_full_recall"] == pytest.approx((honest < 0.755).mean())
    assert quality(honest, poison[1:])["fpr_at_99_recall"] > 0  # of 99 all but one are less than 99 %


def test_rounds_are_counted_by_attack_and_in_all(tmp_path, index):
    masks = [
        kept(tmp_path / f"masks/epoch_00{epoch}", index, rows) for epoch, rows in ((2, [0, 1, 2, 4]), (3, [0, 2, 3]))
    ]
    files = ScoreFiles(tmp_path / "masks/epoch_002/scores", index, 1)
    files.claim()
    for shard, scores in enumerate(([0.9, 0.5, 0.8, 0.4], [0.6, 0.7, 0.1])):
        files.write(shard, np.array(scores, np.float32), {})
    of_all, of_attack = selection_quality(selection_rounds(tmp_path, Config(), index), Poisoned, index)
    # Honest: rows 0, 2, 3 and 5, with scores .9, .8, .4, .7; poison: 1 (patch, .5) and 4 (blend, .6); row 6 is a decoy.
    assert of_all == {
        "epoch": [2, 3],
        "recall": [0.0, 1.0],
        "false_positives": [0.5, 0.25],
        "auroc": [0.75, None],
        "fpr_at_full_recall": [0.25, None],
        "fpr_at_99_recall": [0.25, None],
    }
    assert of_attack["patch"]["recall"] == [0.0, 1.0] and of_attack["patch"]["auroc"] == [0.75, None]
    assert set(of_attack) == {"patch", "blend"} and "false_positives" not in of_attack["patch"]
    assert poison_fractions(masks, Poisoned, index) == [0.5, 0.0]


def test_the_mask_of_a_filter_is_a_round_and_that_of_cleanclip_is_none(tmp_path, index):
    kept(tmp_path / "filter", index, [0, 2, 4])
    config = Config()
    config.train.method, config.data.mask, config.data.overlay = "clip", str(tmp_path / "filter"), "attack"
    (only,) = selection_rounds(tmp_path / "run", config, index)
    assert isinstance(only, Round) and only.epoch is None and only.scores() is None
    of_all, _ = selection_quality([only], Poisoned, index)
    assert of_all["recall"] == [0.5] and of_all["false_positives"] == [0.5] and of_all["auroc"] == [None]
    assert np.flatnonzero(trained_on(tmp_path, config, index)).tolist() == [0, 2, 4]
    config.train.method = "cleanclip"
    assert selection_rounds(tmp_path / "run", config, index) == []


def test_a_run_without_selection_has_no_round(tmp_path, index):
    of_all, of_attack = selection_quality([], Poisoned, index)
    assert all(values == [] for values in (*of_all.values(), *of_attack["patch"].values()))
