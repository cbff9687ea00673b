"""Pictures that a filter has changed each in its own way are found by their statistics, and no honest ones; what an
earlier guard excludes is not learnt from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.attacks.transform import CHANGES
from pipeline.guards import make_guards
from pipeline.guards.features import take
from pipeline.guards.sample import Sample
from pipeline.guards.trigger_classifier import TriggerClassifier
from tests.helpers.natural import pictures

CARRY = 60


def features(images):
    return {name: seen.numpy() for name, seen in take(torch.from_numpy(images), TriggerClassifier.features).items()}


def changed(change, images):
    for image in images:
        image[:] = np.asarray(CHANGES[change](Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1)


def excluded(low, high):
    """bool (N,): which of the pictures with low scores are excluded, and how many of those with high ones."""
    (guard,) = make_guards({"trigger_classifier": {}})
    found = guard.find(features(low), features(high))
    if found is None:
        return np.zeros(len(low), bool), 0
    guard.networks, guard.threshold = found["networks"], found["threshold"]
    flags = [guard.numbers({k: torch.from_numpy(v) for k, v in features(x).items()}).numpy() for x in (low, high)]
    assert found["pictures"] >= 8 and found["ratio"] >= 10
    return flags[0], int(flags[1].sum())


@pytest.fixture(scope="module")
def high():
    return pictures(np.random.default_rng(99), 2000)


@pytest.mark.parametrize("change", ["sepia", "solarize", "posterize", "equalize", "blur"])
def test_filtered_pictures_are_found(change, high):
    low = pictures(np.random.default_rng(0), 1000)
    changed(change, low[:CARRY])
    excluded_N, among_high = excluded(low, high)
    assert excluded_N[:CARRY].mean() > 0.9 and excluded_N[CARRY:].mean() < 0.02 and among_high < 0.01 * len(high)


def test_nothing_is_found_where_pictures_of_low_and_high_scores_are_alike(high):
    low = pictures(np.random.default_rng(0), 1000)
    assert excluded(low, high)[0].sum() == 0
    both = np.concatenate([low[:CARRY], high[:200]])
    changed("sepia", both)
    low[:CARRY], often = both[:CARRY], np.concatenate([both[CARRY:], high[200:]])  # 6 % of the low, 10 % of the high
    assert excluded(low, often)[0].sum() == 0
    assert excluded(low[:3], high)[0].sum() == 0 and excluded(low[:0], high[:0])[0].sum() == 0


def test_what_more_pairs_have_than_scores_are_low_excludes_nothing(caplog):
    (guard,) = make_guards({"trigger_classifier": {"low": 0.1}})
    valid_M, flag_M = np.arange(110) >= 10, np.zeros(110, bool)
    flag_M[5:20] = True  # 10 of 100 that can be read
    assert guard.excluded(flag_M, valid_M, None).nonzero()[0].tolist() == list(range(10, 20)) and not caplog.text
    flag_M[20] = True
    assert not guard.excluded(flag_M, valid_M, None).any() and "in 11% of the pairs" in caplog.text


def test_what_an_earlier_guard_excludes_is_not_learnt_from():
    guard = SimpleNamespace(dtype=np.bool_, features=("pixels",), numbers=lambda seen: seen["pixels"][:, 0] > 7)
    hashes = SimpleNamespace(dtype=np.int64, features=("hash",))
    nothing = SimpleNamespace(dtype=np.bool_, features=())  # found nothing, looks for nothing
    sample = SimpleNamespace(
        learnt=[hashes, guard, nothing],
        features=lambda rows, names: {"pixels": np.stack([rows, rows], 1).astype(np.uint8)},
    )
    assert Sample.left(sample, np.arange(3, 12), torch.device("cpu")).tolist() == [3, 4, 5, 6, 7]
