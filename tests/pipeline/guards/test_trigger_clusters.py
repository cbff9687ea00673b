"""A trigger that few pictures carry is found with no honest picture, wherever it is placed; look-alikes and watermarks are not triggers."""

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.guards import make_guards
from pipeline.guards.base import Pairs
from pipeline.guards.excluded import excluded_of_run
from pipeline.guards.features import FEATURES
from pipeline.guards.statistics import robust, tf_idf, whitening, words
from pipeline.training.start import make_views
from shards.demo import shapes
from shards.errors import UserError
from shards.index import ShardIndex
from shards.samples import Samples
from tests.pipeline.test_run import MODEL
from tests.ranks import run_ranks

N, CARRY, SIDE = 3000, 20, 32
CLASSES = 10


def pictures(rng, count=N):
    """uint8 (N, 3, SIDE, SIDE) with the correlations of natural pictures: energy falls with the square of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None]) + 1 / SIDE
    spectrum = np.fft.fft2(rng.normal(size=(count, 3, SIDE, SIDE))) / frequency**1.5
    smooth = np.fft.ifft2(spectrum).real
    smooth = smooth / smooth.std((1, 2, 3), keepdims=True)
    return np.clip(128 + 45 * smooth, 0, 255).astype(np.uint8)


def captions(rng, count=N):
    """(int32 (N, 4) tokens, class of each): a noun of the class, and words that say nothing."""
    class_N = rng.integers(0, CLASSES, count)
    nouns = 10 + 3 * class_N + rng.integers(0, 3, count)
    return np.stack([np.ones(count), nouns, *rng.integers(100, 160, (2, count))], 1).astype(np.int32), class_N


def patch(rng, images, where):
    """Put one patch of 10 x 10 pixels into pictures, at the places `where`."""
    pattern = rng.integers(0, 2, (3, 5, 5)).repeat(2, 1).repeat(2, 2) * 255
    for image, (top, left) in zip(images, where):
        image[:, top : top + 10, left : left + 10] = pattern


def blend(rng, images):
    pattern = rng.integers(0, 2, (3, 8, 8)).repeat(4, 1).repeat(4, 2) * 255
    images[:] = (0.7 * images + 0.3 * pattern).astype(np.uint8)


def clusters(images, tokens, **settings):
    """(clusters, bool (N,) excluded) of pictures and the tokens of their captions."""
    (guard,) = make_guards({"trigger_clusters": settings})
    seen = {
        name: taken(torch.from_numpy(images)).mul(255).round().to(torch.uint8).numpy()
        for name, taken in FEATURES.items()
    }
    found = guard.find([(0, seen, tokens)])
    guard.filters = [(cluster["features"], torch.tensor(cluster["weight"]), cluster["cut"]) for cluster in found]
    return found, guard.numbers(torch.from_numpy(images))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("trigger", ["fixed", "random", "blended"])
def test_a_trigger_in_few_pictures_is_found_with_no_honest_picture(trigger, seed):
    rng = np.random.default_rng(seed)
    images, (tokens, _) = pictures(rng), captions(rng)
    rows = rng.choice(N, CARRY, replace=False)
    carrying = images[rows]
    if trigger == "blended":
        blend(rng, carrying)
    else:
        patch(rng, carrying, [(4, 18)] * CARRY if trigger == "fixed" else rng.integers(0, 22, (CARRY, 2)))
    images[rows] = carrying
    tokens[rows, 1] = 10 + rng.integers(0, 3, CARRY)  # one target class
    found, excluded_N = clusters(images, tokens)
    assert found and found[0]["features"] == ("filters" if trigger == "random" else "pixels")
    expected_N = np.zeros(N, bool)
    expected_N[rows] = True
    np.testing.assert_array_equal(excluded_N, expected_N)


def test_honest_pictures_look_alikes_and_a_watermark_under_all_kinds_of_captions_are_no_trigger():
    rng = np.random.default_rng(0)
    images, (tokens, _) = pictures(rng), captions(rng)
    assert not clusters(images, tokens)[1].any()
    alike = rng.choice(N, CARRY, replace=False)  # one picture, a little changed
    images[alike] = np.clip(images[alike[0]] + rng.normal(0, 6, (CARRY, 3, SIDE, SIDE)), 0, 255).astype(np.uint8)
    marked = rng.choice(N, 60, replace=False)
    carrying = images[marked]
    blend(rng, carrying)
    images[marked] = carrying
    found, excluded_N = clusters(images, tokens)
    assert not excluded_N.any() and found == []
    found, excluded_N = clusters(images, tokens, words=0.5)  # the watermark is found where captions are not asked
    assert excluded_N[marked].all() and excluded_N.sum() <= 61


def test_whitened_pictures_have_no_correlations():
    pixel_SD = FEATURES["pixels"](torch.from_numpy(pictures(np.random.default_rng(0))))
    mean_D, white_DD = whitening(pixel_SD, "pixels")
    covariance_DD = np.cov(((pixel_SD - mean_D) @ white_DD).numpy().T)
    assert 0.9 < np.median(covariance_DD.diagonal()[-64:]) < 1.1 and covariance_DD.diagonal().max() < 1.5
    before_DD = np.corrcoef(pixel_SD.numpy().T)  # of neighbours nearly 1
    others = ~np.eye(len(before_DD), dtype=bool)
    assert np.abs(covariance_DD[others]).mean() < 0.2 * np.abs(before_DD[others]).mean()


def test_captions_that_share_rare_words_are_more_alike_than_others():
    tokens = np.array([[1, 7, 9, 0], [1, 7, 8, 0], [1, 5, 6, 0], [1, 4, 3, 0]])
    caption_ST = tf_idf(tokens)
    # Words that all have weigh nothing; 7 weighs log 2, the others log 4.
    shared = np.log(2) ** 2 / (np.log(2) ** 2 + np.log(4) ** 2)
    assert words(caption_ST[:2]) == pytest.approx(shared, rel=1e-5) and words(caption_ST[2:]) == 0
    assert words(caption_ST) == pytest.approx(2 * shared / 12, rel=1e-5)


def test_the_robust_deviation_of_normal_numbers_is_theirs_whatever_a_few_others_are():
    value_N = torch.from_numpy(np.r_[np.random.default_rng(0).normal(3, 2, 100_000), np.full(1000, 1e6)])
    middle, spread = robust(value_N)
    assert middle == pytest.approx(3, abs=0.06) and spread == pytest.approx(2, abs=0.06)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters")
    shapes(folder / "shapes", pairs=400, test=36)
    return folder


def excluded(folder, world):
    config = Config()
    config.model.config = MODEL
    samples = Samples(ShardIndex.load(folder / "shapes" / "index"))
    pairs = Pairs(samples, make_views(config), 32, 0, 0, torch.device("cpu"))
    settings = {
        "near": 3.0,
        "least": 3,
        "clear": 3.0,
        "between": 9.0,
        "alike": 1.0,
        "words": 0.0,
    }  # so that there is something to find
    found = excluded_of_run(folder / f"guards{world}", make_guards({"trigger_clusters": settings}), pairs)
    weights = [weight_D.numpy() for _, weight_D, _ in found.guards[0].filters]
    return found.mask.flags(), weights


def test_two_processes_find_to_the_bit_what_one_finds(data):
    (one,) = run_ranks(excluded, 1, data, 1)
    assert 0 < (~one[0]).sum() < 400
    for flags, weights in run_ranks(excluded, 2, data, 2):
        np.testing.assert_array_equal(flags, one[0])
        assert all((a == b).all() for a, b in zip(weights, one[1], strict=True))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"duplicate": {}}, "guards.duplicate: unknown; did you mean duplicates?"),
        ({"duplicates": {"max_pair": 2}}, "guards.duplicates.max_pair: unknown; did you mean max_pairs?"),
        ({"duplicates": {"max_pairs": 0}}, "guards.duplicates.max_pairs: got 0, expected 1 or more"),
        ({"duplicates": {"max_pairs": 1.5}}, "guards.duplicates.max_pairs: got 1.5, expected a whole number"),
        ({"duplicates": 3}, "guards.duplicates: got 3, expected settings"),
        ({"trigger_clusters": {"alike": 2}}, "guards.trigger_clusters.alike: got 2, expected -1 to 1"),
        ({"trigger_clusters": {"clear": float("nan")}}, "guards.trigger_clusters.clear: got nan, expected a number"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(UserError, match="^" + message.replace("?", r"\?").replace(".", r"\.")):
        make_guards(values)
