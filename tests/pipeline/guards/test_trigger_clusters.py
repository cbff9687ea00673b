"""A trigger that few pictures with low scores carry is found with no honest picture, wherever it is placed; a watermark
is no trigger."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.attacks.transform import compressed
from pipeline.attacks.wanet import Warp
from pipeline.config.schema import Config
from pipeline.guards import make_guards
from pipeline.guards.excluded import score_and_exclude
from pipeline.guards.features import FEATURES, take
from pipeline.guards.sample import low_and_high
from pipeline.guards.statistics import robust, whitening
from pipeline.guards.trigger_clusters import TriggerClusters
from pipeline.safety.score_files import ScoreFiles
from pipeline.safety.scoring import Reading
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from tests.helpers.models import MODEL
from tests.helpers.natural import SIDE, pictures
from tests.helpers.ranks import run_ranks

CARRY = 20


def patch(rng, images, where):
    """Put one patch of 10 x 10 pixels into pictures, at the places `where`."""
    pattern = rng.integers(0, 2, (3, 5, 5)).repeat(2, 1).repeat(2, 2) * 255
    for image, (top, left) in zip(images, where):
        image[:, top : top + 10, left : left + 10] = pattern


def blend(rng, images):
    pattern = rng.integers(0, 2, (3, 8, 8)).repeat(4, 1).repeat(4, 2) * 255
    images[:] = (0.7 * images + 0.3 * pattern).astype(np.uint8)


def features(images):
    return take(torch.from_numpy(images), TriggerClusters.features)


def as_numpy(seen):
    return {name: seen_BD.numpy() for name, seen_BD in seen.items()}


def triggers(low, high, images=None, **settings):
    """(what is found, bool (N,): which of `images`, of those with low scores without them, are excluded)."""
    (guard,) = make_guards({"trigger_clusters": settings})
    found = guard.find(as_numpy(features(low)), as_numpy(features(high)))
    guard.filters = [(one["features"], torch.tensor(one["filter"]), one["threshold"]) for one in found]
    return found, guard.numbers(features(low if images is None else images))


@pytest.fixture(scope="module")
def high():
    return pictures(np.random.default_rng(99), 4000)


def warp(images):
    """Move pixels by a field that is the same in all pictures."""
    field = Warp()
    for image in images:
        moved = field.draw(Image.fromarray(image.transpose(1, 2, 0)), 0, (0, 0))
        image[:] = np.asarray(moved).transpose(2, 0, 1)


def compress(images):
    for image in images:
        image[:] = np.asarray(compressed(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1)


def carriers(rng, trigger, images):
    """The same pictures with a trigger."""
    if trigger == "blended":
        blend(rng, images)
    elif trigger == "warp":
        warp(images)
    elif trigger == "jpeg":
        compress(images)
    else:
        patch(rng, images, [(4, 18)] * len(images) if trigger == "fixed" else rng.integers(0, 22, (len(images), 2)))
    return images


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("trigger", ["fixed", "random", "blended", "warp", "jpeg"])
def test_a_trigger_in_few_pictures_is_found_with_no_honest_picture(trigger, seed, high):
    rng = np.random.default_rng(seed)
    low = pictures(rng, 1000)
    low[:CARRY] = carriers(rng, trigger, low[:CARRY])
    found, excluded_N = triggers(low, high)
    expected = {"random": "filters", "warp": "differences", "jpeg": "spectrum"}.get(trigger, "pixels")
    assert found and found[0]["features"] == expected
    np.testing.assert_array_equal(np.flatnonzero(excluded_N), np.arange(CARRY))
    assert triggers(low, high, high)[1].sum() == 0


def test_what_is_as_frequent_among_high_scores_is_no_trigger(high):
    rng = np.random.default_rng(0)
    low = pictures(rng, 1000)
    assert triggers(low, high) == ([], pytest.approx(np.zeros(1000, bool)))
    watermarked = high.copy()
    both = carriers(rng, "blended", np.concatenate([low[:CARRY], high[:10]]))
    low[:CARRY], watermarked[:10] = both[:CARRY], both[CARRY:]  # 2 % of the low scores, 0.25 % of the high ones
    assert triggers(low, watermarked, ratio=10.0)[0] == []
    found, excluded_N = triggers(low, watermarked, ratio=5.0)
    assert [one["ratio"] for one in found] == [pytest.approx(8, abs=2)] and excluded_N[:CARRY].all()


def test_copies_and_a_series_of_look_alikes_are_no_trigger_and_hide_none(high):
    rng = np.random.default_rng(0)
    low = pictures(rng, 1000)
    low[CARRY : 2 * CARRY] = low[CARRY]
    noise = rng.normal(0, 6, (CARRY, 3, SIDE, SIDE))
    low[2 * CARRY : 3 * CARRY] = np.clip(low[2 * CARRY] + noise, 0, 255)  # one picture, a little changed
    assert triggers(low, high)[0] == []
    low[:CARRY] = carriers(rng, "fixed", low[:CARRY])
    assert np.flatnonzero(triggers(low, high)[1]).tolist() == list(range(CARRY))


@given(
    st.lists(st.floats(-1, 1, width=32) | st.just(float("nan")), max_size=60),
    st.integers(0, 80),
    st.floats(0.05, 0.5),
    st.integers(0, 3),
)
def test_low_and_high_scores_are_chosen_from_opposite_ends(scores, sample, low, seed):
    score_N = np.array(scores, np.float32)
    row_R = np.random.default_rng(seed).permutation(len(score_N))
    low_L, high_H = low_and_high(score_N[row_R], row_R, low, sample)
    there = np.sort(score_N[~np.isnan(score_N)])
    assert (np.diff(low_L) > 0).all() and (np.diff(high_H) > 0).all()
    assert (score_N[low_L] < np.quantile(there, low)).all() if len(there) else len(low_L) == 0
    assert (score_N[high_H] > np.median(there)).all() if len(there) else len(high_H) == 0
    assert len(low_L) <= min(low * len(there) + 1, sample) and len(high_H) <= min(len(there) / 2, 2 * sample)


def test_whitened_pictures_have_no_correlations():
    pixel_SD = FEATURES["pixels"](torch.from_numpy(pictures(np.random.default_rng(0), 3000))).float() / 255
    mean_D, white_DD = whitening(pixel_SD)
    covariance_DD = np.cov(((pixel_SD - mean_D) @ white_DD).numpy().T)
    assert 0.9 < np.median(covariance_DD.diagonal()[-64:]) < 1.1 and covariance_DD.diagonal().max() < 1.5
    before_DD = np.corrcoef(pixel_SD.numpy().T)  # of neighbours nearly 1
    others = ~np.eye(len(before_DD), dtype=bool)
    assert np.abs(covariance_DD[others]).mean() < 0.2 * np.abs(before_DD[others]).mean()


def test_robust_deviation_ignores_a_few_outliers():
    value_N = torch.from_numpy(np.r_[np.random.default_rng(0).normal(3, 2, 100_000), np.full(1000, 1e6)])
    middle, spread = robust(value_N)
    assert middle == pytest.approx(3, abs=0.06) and spread == pytest.approx(2, abs=0.06)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters")
    shapes(folder / "shapes", pairs=400, test=36)
    return folder


GUARDS = {
    "trigger_clusters": {"low": 0.3, "near": 3.0, "least": 3, "ratio": 1.5},  # so that there is something to find
    "trigger_classifier": {"low": 0.4, "least": 2, "ratio": 1.1},
}


def excluded(folder, world, name):
    config = Config()
    config.model.config = MODEL
    torch.manual_seed(0)
    towers, index = Towers(build_model({"config": MODEL}), *pixel_stats()), ShardIndex.load(folder / "shapes" / "index")
    reading = Reading(towers, Samples(index), make_views(config), 32, torch.device("cpu"))
    guards, files = make_guards({name: GUARDS[name]}), ScoreFiles(folder / f"scores_{name}{world}", index, 0)
    watch = lambda what: lambda done, rounds: None  # noqa: E731
    _, _, found = score_and_exclude(guards, folder / f"guards_{name}{world}", reading, files, 0, watch)
    return found.masks[name].flags()


@pytest.mark.parametrize("name", GUARDS)
def test_two_processes_exclude_what_one_excludes(data, name):
    (one,) = run_ranks(excluded, 1, data, 1, name)
    assert 0 < (~one).sum() < 400
    for flags in run_ranks(excluded, 2, data, 2, name):
        np.testing.assert_array_equal(flags, one)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"duplicate": {}}, "guards.duplicate: unknown; did you mean guards.duplicates?"),
        (
            {"duplicates": {"max_pair": 2}},
            "guards.duplicates.max_pair: unknown; did you mean guards.duplicates.max_pairs?",
        ),
        ({"duplicates": {"max_pairs": 0}}, "guards.duplicates.max_pairs: got 0, expected a whole number > 0"),
        ({"duplicates": {"max_pairs": 1.5}}, "guards.duplicates.max_pairs: got 1.5, expected a whole number"),
        ({"duplicates": 3}, "guards.duplicates: got 3, expected a mapping of max_pairs or null"),
        ({"trigger_clusters": {"low": 2}}, "guards.trigger_clusters.low: got 2, expected a number >= 0.001 and <= 0.5"),
        (
            {"trigger_clusters": {"near": float("nan")}},
            "guards.trigger_clusters.near: got nan, expected a finite number >= 0",
        ),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(UserError, match="^" + message.replace("?", r"\?").replace(".", r"\.")):
        make_guards(values)
