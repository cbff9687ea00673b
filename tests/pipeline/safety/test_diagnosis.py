"""The figures of a selection round mean what they say."""

import json

import numpy as np
import pytest

from pipeline.config.schema import Selection
from pipeline.distributed import comm
from pipeline.safety.diagnosis import LEAST_PAIRS, change, out_of_range, separation
from pipeline.safety.mixture import Mixture, fit_mixture, fit_sklearn, histogram
from pipeline.safety.round import load_round, save_round, select_pairs
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.order.safe_mask import SafeMask, SavedMask
from tests.helpers.embeddings import draw


def of(scores):
    counts_K = histogram(scores, -1, 1)
    return separation(counts_K, -1, 1, fit_mixture(counts_K, -1, 1))


def test_two_groups_are_told_from_one():
    two, one = of(draw(0, 0.3, (0.1, 0.4), (0.05, 0.05))), of(draw(0, 0.0, (0.1, 0.4), (0.05, 0.05)))
    assert two["bic_two"] < two["bic_one"] and one["bic_two"] > one["bic_one"]
    assert two["ashman_d"] == pytest.approx(6, abs=0.2) and two["overlap"] < 0.01


def test_the_overlap_of_two_equal_components_is_the_error_of_telling_them_apart():
    """Means 2 deviations apart: half of erfc(1 / sqrt 2) = 0.1587 of the scores fall on the wrong side."""
    found = separation(
        histogram(np.array([0, 0.1, 0.2]), -1, 1), -1, 1, Mixture((0.0, 0.2), (0.1, 0.1), (0.5, 0.5), 0.0)
    )
    assert found["overlap"] == pytest.approx(0.1587, abs=1e-4) and found["ashman_d"] == pytest.approx(2)


def test_what_moved_since_the_last_round():
    before, now = np.full(100, 0.1), np.full(100, 0.3)
    masks = [SafeMask.from_flags([60, 40], np.arange(100) < count) for count in (50, 70)]
    masks[1].bits[0] = 0  # the first 8 go out
    found = change(histogram(now, -1, 1), -1, 1, masks[1], histogram(before, -1, 1), masks[0])
    assert found == {"shift": pytest.approx(0.2, abs=1e-4), "flips_in": 20, "flips_out": 8}


@pytest.fixture
def index(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "world", lambda: 1)
    return build_index([str(path) for path in make_shards([60, 0, 40])], tmp_path / "index")


def test_a_round_tells_how_it_came_about_and_is_the_same_when_loaded(index, tmp_path):
    cos_N = draw(0, 0.3, (0.1, 0.4), (0.05, 0.05), 100)
    first = select_pairs(cos_N, index.counts, Selection(), 0)
    save_round(tmp_path / "first", first, index, {"epoch": 2, "step": 0})
    second = select_pairs(
        cos_N + np.float32(0.1), index.counts, Selection(), 1, first.first_fraction, tmp_path / "first"
    )
    save_round(tmp_path / "second", second, index, {"epoch": 3, "step": 9})
    assert second.diagnosis["shift"] == pytest.approx(0.1, abs=1e-3)
    assert (second.diagnosis["flips_in"], second.diagnosis["flips_out"]) == (1, 0)
    assert first.diagnosis["fraction_by_posterior"] == first.fraction and not first.note
    loaded = load_round(tmp_path / "second", index)
    assert loaded.summary() == second.summary() and np.array_equal(loaded.mask.bits, second.mask.bits)
    assert "1 in, 0 out" in second.line()


def test_a_round_without_a_safe_pair_is_plain_json(index, tmp_path):
    none = select_pairs(np.full(100, np.nan, np.float32), index.counts, Selection(), 0)
    save_round(tmp_path / "none", none, index, {"epoch": 2, "step": 0, "config": ""})
    text = (tmp_path / "none" / "mask.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["threshold"] is None and not none.mask.flags().any()
    assert load_round(tmp_path / "none", index).threshold == np.inf == SavedMask(tmp_path / "none").meta["threshold"]


@pytest.mark.parametrize("scores", [draw(0, 0.0, (0, 0.2), (1, 0.05), 100), np.full(100, 0.2, np.float32)])
def test_a_fit_that_is_no_mixture_of_two_does_not_decide(index, scores):
    fixed = {"mixture": "converged", "rank_by": "score"}
    selected = select_pairs(scores, index.counts, Selection(least_fraction=0.07, **fixed), 0)
    assert (
        selected.fraction == 0.07
        and "no threshold by the mixture" in selected.note
        and "first fraction is 7.0%" in selected.note
    )
    assert selected.diagnosis["fraction_by_posterior"] is None
    assert select_pairs(scores, index.counts, Selection(growth=0.1, **fixed), 2, 0.07).fraction == pytest.approx(0.27)


def test_too_few_pairs_to_be_protected_are_told():
    assert out_of_range(LEAST_PAIRS) == "" and out_of_range(5_409).startswith("5,409 pairs are too few")


def test_scores_that_are_nearly_one_have_finite_figures():
    """As of a model that has collapsed: different scores, all in one bin of the histogram."""
    score_N = np.float32(0.3) + np.arange(40, dtype=np.float32) * np.float32(1e-7)
    found = separation(histogram(score_N, -1, 1), -1, 1, fit_sklearn(score_N))
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY"])
@pytest.mark.parametrize("name", ["histogram.npy", "negative_controls.npy"])
def test_a_damaged_file_of_a_round_is_named_and_no_later_round_needs_it(index, tmp_path, name, content):
    cos_N = draw(0, 0.3, (0.1, 0.4), (0.05, 0.05), 100)
    save_round(tmp_path / "first", select_pairs(cos_N, index.counts, Selection(), 0), index, {"epoch": 2, "step": 0})
    (tmp_path / "first" / name).write_bytes(content)
    with pytest.raises(UserError, match="mask .*first: a file of it cannot be read"):
        load_round(tmp_path / "first", index)
    second = select_pairs(cos_N, index.counts, Selection(), 1, 0.5, tmp_path / "first")
    assert ("shift" in second.diagnosis) == (name != "histogram.npy")
