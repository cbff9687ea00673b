"""One mixture, one threshold: what converged EM on the raw scores gives, the same bits at any world size, monotone."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from pipeline.safety.mixture import DegenerateFit, Mixture, fit_mixture, histogram, posterior_threshold
from tests.helpers.embeddings import draw

MIXTURES = [
    (0.1, (0.05, 0.25), (0.06, 0.08)),
    (0.3, (0.1, 0.3), (0.05, 0.05)),
    (0.5, (0.1, 0.3), (0.05, 0.15)),
    (0.7, (-0.2, 0.4), (0.1, 0.1)),
    (0.2, (0.0, 0.2), (0.1, 0.03)),
]


@pytest.mark.parametrize("seed, mixture", enumerate(MIXTURES))
def test_it_is_the_converged_scikit_learn_mixture(seed, mixture):
    scores = draw(seed, *mixture)
    ours = fit_mixture(histogram(scores, -1, 1), -1, 1)
    raw = scores.astype(np.float64)[:, None]
    weight, means, stds = mixture
    theirs = GaussianMixture(
        2,
        tol=1e-9,
        max_iter=20_000,
        weights_init=[weight, 1 - weight],
        means_init=np.array(means)[:, None],
        precisions_init=1 / np.square(stds)[:, None, None],
    ).fit(raw)
    order = np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(ours.mean, theirs.means_[order, 0], atol=1e-3)
    np.testing.assert_allclose(ours.std, np.sqrt(theirs.covariances_[order, 0, 0]), atol=1e-3)
    np.testing.assert_allclose(ours.weight, theirs.weights_[order], atol=1e-3)
    assert ours.log_likelihood >= theirs.lower_bound_ - 1e-4


def test_it_finds_the_truth_where_an_early_stop_does_not():
    """0.1 x N(.05, .06) + 0.9 x N(.25, .08) must not come back as weights .35/.65."""
    found = fit_mixture(histogram(draw(0, *MIXTURES[0], 1_000_000), -1, 1), -1, 1)
    np.testing.assert_allclose(found.mean, (0.05, 0.25), atol=5e-3)
    np.testing.assert_allclose(found.weight, (0.1, 0.9), atol=1e-2)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_same_bits_at_any_world_size(world):
    scores = draw(3, *MIXTURES[1])
    summed = sum(histogram(part, -1, 1) for part in np.array_split(scores, world))
    assert fit_mixture(summed, -1, 1) == fit_mixture(histogram(scores, -1, 1), -1, 1)


def test_the_wider_upper_component_does_not_call_the_lowest_scores_safe():
    """N(.10, .05) and N(.30, .15): the posterior at -0.30 is 1, and yet it is no safe score."""
    mixture = Mixture((0.1, 0.3), (0.05, 0.15), (0.5, 0.5), 0.0)
    assert mixture.posterior(-0.30) > 0.999
    assert 0.2 < posterior_threshold(mixture) < 0.3


@given(
    st.floats(-0.5, 0.5),
    st.floats(0.01, 0.6),
    st.floats(0.01, 0.3),
    st.floats(0.01, 0.3),
    st.floats(0.05, 0.95),
    st.floats(0.5, 0.99),
)
def test_the_threshold_is_where_the_posterior_reaches_its_value(mean, apart, std0, std1, weight, posterior):
    mixture = Mixture((mean, mean + apart), (std0, std1), (weight, 1 - weight), 0.0)
    try:
        threshold = posterior_threshold(mixture, posterior)
    except DegenerateFit:
        return
    assume(abs(threshold) < 20)
    assert mixture.posterior(threshold) == pytest.approx(posterior, abs=1e-4)
    step = 1e-3 * min(std0, std1)
    assert mixture.posterior(threshold + step) >= mixture.posterior(
        threshold - step
    )  # crossed upwards: above it is safer


@pytest.mark.parametrize("scores", [[], [0.1] * 50, [0.1] * 50 + [0.2] * 50, [np.nan] * 9])
def test_what_is_no_mixture_is_said(scores):
    with pytest.raises(DegenerateFit):
        fit_mixture(histogram(np.array(scores, np.float32), -1, 1), -1, 1)


def test_the_histogram_counts_all_but_nan():
    counts = histogram(np.array([-2, -1, 0, 0.9999999, 1, 3, np.nan], np.float32), -1, 1, bins=4)
    assert counts.tolist() == [2, 0, 1, 3]


def test_it_survives_being_saved():
    mixture = fit_mixture(histogram(draw(1, *MIXTURES[2]), -1, 1), -1, 1)
    assert Mixture.from_dict(mixture.to_dict()) == mixture


def converged_em(x, theta):
    """(log-likelihood, theta) of plain EM on the raw scores until nothing moves any more; theta: rows (weight, mean,
    variance)."""
    moved = np.inf
    while moved > 1e-7:
        weight, mean, variance = theta.T[:, :, None]
        p = weight * np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        fraction = p / p.sum(0)
        total = fraction.sum(1)
        mean = (fraction @ x) / total
        variance = (fraction @ x**2) / total - mean**2
        before, theta = theta, np.stack([total / len(x), mean, variance], 1)
        moved = np.abs(theta - before).max()
    return np.log(p.sum(0)).mean(), theta


def test_two_hundred_mixtures_are_those_of_converged_em_on_raw_scores():
    rng = np.random.default_rng(0)
    for seed in range(200):
        low, std = rng.uniform(-0.3, 0.1), rng.uniform(0.03, 0.09, 2)
        weight, high = rng.uniform(0.05, 0.95), low + rng.uniform(2.5, 5) * np.sqrt((std**2).mean())
        x = draw(seed, weight, (low, high), std, 2_000).astype(np.float64)
        ours = fit_mixture(histogram(x, -1, 1), -1, 1)
        truth = np.array([[weight, low, std[0] ** 2], [1 - weight, high, std[1] ** 2]])
        ends = [converged_em(x, start) for start in (truth, np.array([ours.weight, ours.mean, np.square(ours.std)]).T)]
        likelihood, theta = max(ends, key=lambda end: end[0])
        theirs = theta[np.argsort(theta[:, 1])].T
        assert ours.log_likelihood > likelihood - 1e-4, seed
        np.testing.assert_allclose([ours.weight, ours.mean, ours.std], [*theirs[:2], np.sqrt(theirs[2])], atol=1e-3)
