"""preset=paper is the released recipe of SafeCLIP. Every expected value here is calculated from the recipe's
formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F

from pipeline.config.load import load_config
from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.safety.mixture import Mixture, fit_sklearn
from pipeline.safety.round import select_pairs
from pipeline.safety.selection import scheduled_fraction, select_top
from pipeline.training import engine as engines
from pipeline.training.curriculum import curriculum, epoch_steps, learning_rate, released_rate
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue
from shards.index.build_index import build_index
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.augment import drawn_view, random_box
from shards.views.batch import Batch
from shards.views.loader import PlainBatches, TrainBatches
from tests.helpers.models import MODEL
from tests.helpers.ranks import run_ranks


@pytest.fixture
def paper(tmp_path):
    """Function: overrides ("a.b=value") -> Config of preset=paper."""
    settings = {"preset": "paper", "data": {"index": "none", "streams": 4}, "model": {"config": MODEL}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(settings))
    return lambda *overrides: load_config(tmp_path / "paper.yaml", overrides)


def test_the_preset_has_the_released_settings(paper):
    config = paper()
    data, train, selection = config.data, config.train, config.selection
    published = dict(crop_min=0.08, flip=0.5, jitter=0.8, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1)
    for augment in (data.clip_augment, data.unimodal_augment):
        assert vars(augment) == {**published, "grey": 0.2, "blur": 1.0}
    assert (data.clip_eda, data.unimodal_eda, data.eda_synonyms, data.eda_clean, data.eda_once) == (
        0.1,
        0.1,
        "wordnet",
        True,
        True,
    )
    assert (train.epochs, train.unimodal_epochs, train.low_rate_epochs, train.clip_views) == (32, 5, 1, 2)
    assert (train.lr, train.low_rate_lr, train.warmup_steps, train.schedule) == (5e-4, 5e-6, 10_000, "released")
    assert (train.weight_decay, train.betas, train.eps, train.clip) == (0.1, (0.9, 0.999), 1e-8, 0.0)
    assert (train.batch_size, train.precision, train.support_queue) == (128, "fp32", 256)
    assert (selection.posterior, selection.first_fraction, selection.least_fraction) == (0.9, None, 0.0)
    assert (selection.growth, selection.max_fraction, selection.risky, selection.refill) == (
        0.01,
        0.85,
        "unimodal",
        False,
    )
    assert (selection.mixture, selection.rank_by, selection.scored_view) == ("sklearn", "posterior", "augmented")


def directed(row, column, scale):
    """Cross-entropy of scale * row . column with diagonal targets: numpy, float64."""
    logits = scale * row @ column.T
    return (np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - np.diag(logits)).mean()


def step_of(kind):
    """(loss of one step, loss by the formulas, the 6 newest stored embeddings, those expected)."""
    torch.manual_seed(0)
    towers = Towers(build_model({"config": MODEL}), *pixel_stats())
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (12, 16))
    stored = F.normalize(torch.randn(8, 16), dim=1)
    queues = {name: SupportQueue(8, 16, "cpu") for name in ("image", "text")}
    for queue in queues.values():
        queue.push(stored, torch.ones(8, dtype=torch.bool))
    with torch.no_grad():
        image, text, scale = (x.double().numpy() for x in towers(images, tokens))
    (i1, i2), (t1, t2), scale, bank = np.split(image, 2), np.split(text, 2), scale.item(), stored.double().numpy()
    if kind == "clip":
        wanted = (directed(i1, t2, scale) + directed(t1, i2, scale)) / 2
    else:
        near_i, near_t = bank[(i1 @ bank.T).argmax(1)], bank[(t1 @ bank.T).argmax(1)]
        wanted = (directed(i2, near_i, scale) + directed(t2, near_t, scale)) / 2
    engine = engines.start_engine(towers, Train(batch_size=6, zero_stage=0), comm.device())
    batch = Batch(images, tokens, torch.ones(6, dtype=torch.bool), torch.arange(6), [])
    loss, _, finite = train_step(engine, queues, batch, kind)
    assert finite
    return float(loss), wanted, queues["image"].queue_PD[:6].numpy(), i1 if kind == "unimodal" else bank[:6]


@pytest.mark.parametrize("kind", ["clip", "unimodal"])
def test_a_step_pairs_the_views_as_published_and_fills_the_memory_with_view_1(kind):
    ((loss, wanted, newest_BD, wanted_BD),) = run_ranks(step_of, 1, kind)
    assert loss == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(newest_BD, wanted_BD, atol=1e-5)


def test_the_rates_are_those_of_the_released_counters(paper):
    """22,000 batches an epoch, as CC3M has; a first safe fraction of .2."""
    train, batches = paper().train, 22_000
    stages, growth = curriculum(train, 1, batches), paper().selection.growth

    def rate(epoch, number):
        return released_rate(stages[epoch], number, batches, 0.2, train, growth)

    def cosine(counter, steps):
        return 5e-4 * (1 + math.cos(math.pi * (counter - 10_000) / (steps - 10_000))) / 2

    # The warm-up epochs: six of them, counted from the second. The rate is 0 where the fifth ends.
    for epoch, number in ((0, 0), (0, 21_999), (3, 500), (4, 0)):
        assert rate(epoch, number) == pytest.approx(cosine((epoch + 1) * 22_000 + number, 6 * 22_000))
    assert rate(4, 21_999) == pytest.approx(0, abs=1e-9)
    assert {learning_rate(stages[5], step, 32 * batches, train) for step in (110_000, 131_999)} == {5e-6}
    # 26 epochs with .20, .21, ... .45 of the batches: 185,900, or 7,150 an epoch, counted from the eighth.
    for epoch, number in ((6, 0), (6, 4_399), (20, 17_000), (24, 0)):
        assert rate(epoch, number) == pytest.approx(cosine((epoch + 1) * 7_150 + number, 185_900))
    assert rate(25, 0) == pytest.approx(0, abs=1e-9) and rate(31, 9_000) > rate(31, 0) > 5e-5  # it rises again

    short = paper("train.epochs=8", "train.unimodal_epochs=1", "train.warmup_steps=30").train
    first = curriculum(short, 1, 10)
    assert [released_rate(first[0], n, 10, 0, short, growth) for n in (0, 9)] == pytest.approx(
        [5e-4 * 11 / 30, 1e-3 / 3]
    )
    # Fewer steps than those of the linear warm-up: 6 * .225 * 10 = 13.5, 2 an epoch.
    assert [released_rate(first[2], n, 10, 0.2, short, growth) for n in (0, 23, 24, 50)] == pytest.approx(
        [5e-4 * 7 / 30, 5e-4, 5e-4, 5e-4]
    )


def test_the_picture_augmentation_is_drawn_as_published(paper):
    """Crops of .08 to 1 of the area, sides from 3/4 to 4/3, flips at .5; jitter (.5, .5, .5, .1) at .8, grey at .2,
    blur always, sigma .1 to 2 at 224 pixels."""
    augment, rng = paper().data.clip_augment, np.random.default_rng(0)
    boxes = np.array([random_box(400, 400, augment.crop_min, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 400**2, np.log(width / height)
    assert area.min() >= 0.08 and area.max() <= 1 and np.abs(ratio).max() <= np.log(4 / 3) + 1e-9
    small = area < 0.5
    assert stats.kstest((area[small] - 0.08) / 0.42, "uniform").pvalue > 1e-3
    assert stats.kstest(ratio[small] / np.log(4 / 3) / 2 + 0.5, "uniform").pvalue > 1e-3

    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = 255
    views = [drawn_view(picture, 32, rng, replace(augment, crop_min=1.0)) for _ in range(2000)]
    flipped = np.mean([pixels[0, 0, 0] == 0 for pixels, _ in views])
    colours = [colour for _, colour in views]
    jittered = [dict(colour.jitter) for colour in colours if colour.jitter]
    shares = flipped, len(jittered) / 2000, np.mean([colour.grey for colour in colours])
    np.testing.assert_allclose(shares, (0.5, 0.8, 0.2), atol=0.04)
    sigma = np.array([colour.blur for colour in colours]) * 224 / 32
    assert stats.kstest((sigma - 0.1) / 1.9, "uniform").pvalue > 1e-3
    for step in range(3):
        factor = np.array([one[step] for one in jittered])
        assert stats.kstest(factor - 0.5, "uniform").pvalue > 1e-3
    turn = np.array([one[3] for one in jittered]) / 255
    assert -0.1 <= turn.min() < -0.09 and 0.09 < turn.max() <= 0.1


def test_an_epoch_goes_over_the_risky_pairs_first_then_over_the_safe_ones(paper):
    config = paper("train.batch_size=4", "train.epochs=3", "train.unimodal_epochs=1", "data.window=16")
    counts, flags = np.array([40, 17, 63]), np.zeros(120, bool)
    flags[np.random.default_rng(0).permutation(120)[:33]] = True
    mask = SafeMask.from_flags(counts, flags)
    steps = epoch_steps(curriculum(config.train, 1, 30)[2], counts, mask, config)
    assert [step.loss for step in steps] == ["unimodal"] * 21 + ["clip"] * 8
    seen = {"clip": [], "unimodal": []}
    for step in steps:
        shard_B, nth_B, _ = step.plan.batch(step.number)
        position_B = step.mask.locate(step.view, shard_B, nth_B)
        seen[step.loss] += (np.array([0, 40, 57])[shard_B] + position_B).tolist()
    assert len(set(seen["clip"])) == 32 and flags[seen["clip"]].all()
    assert len(set(seen["unimodal"])) == 84 and not flags[seen["unimodal"]].any()


def test_the_fractions_of_26_rounds(paper):
    chosen = paper().selection
    found = [scheduled_fraction(0.7, number, chosen) for number in range(26)]
    assert found == pytest.approx([0.7 + 0.01 * n for n in range(15)] + [0.85] * 11)
    assert scheduled_fraction(0.95, 0, chosen) == 0.95 and scheduled_fraction(0.95, 1, chosen) == 0.85


def scores_of_two(seed=0):
    """float32 (4000,): a narrow component, and a wide one of higher mean whose lower tail reaches below the narrow
    one."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0.10, 0.05, 2000), rng.normal(0.30, 0.30, 2000)]).astype(np.float32)


def test_the_first_safe_set_is_that_of_sklearns_posterior(paper):
    score_N = scores_of_two()
    mixture = GaussianMixture(2, random_state=0).fit(np.sort(score_N)[::-1, None])
    posterior_N = mixture.predict_proba(score_N.astype(np.float64)[:, None])[:, mixture.means_[:, 0].argmax()]
    made = select_pairs(score_N, [1500, 2500], paper().selection, 0)
    assert np.array_equal(made.mask.flags(), posterior_N >= 0.9)
    # The recipe's fault: the lowest scores of all are among them.
    assert made.mask.flags()[score_N.argmin()] and made.threshold == score_N.min()
    fixed = select_pairs(score_N, [1500, 2500], paper("preset=paper_fixed").selection, 0)
    assert not fixed.mask.flags()[score_N < 0.2].any() and fixed.threshold == score_N[fixed.mask.flags()].min()


def test_later_safe_sets_are_the_highest_posteriors(paper):
    score_N = scores_of_two(1)
    mixture = GaussianMixture(2, random_state=0).fit(np.sort(score_N)[::-1, None])
    posterior_N = mixture.predict_proba(score_N.astype(np.float64)[:, None])[:, mixture.means_[:, 0].argmax()]
    made = select_pairs(score_N, [4000], paper().selection, 3, first_fraction=0.3)
    wanted = np.zeros(4000, bool)
    wanted[np.argsort(-posterior_N, kind="stable")[: round(0.33 * 4000)]] = True
    assert np.array_equal(made.mask.flags(), wanted)


def test_sklearns_mixture_is_the_one_that_is_kept():
    score_N = np.append(scores_of_two(), np.float32("nan"))
    wanted = GaussianMixture(2, random_state=0).fit(np.sort(score_N[:-1])[::-1, None])
    order = wanted.means_[:, 0].argsort()
    found = fit_sklearn(score_N)
    np.testing.assert_allclose(found.mean, wanted.means_[order, 0])
    np.testing.assert_allclose(found.std, wanted.covariances_[order, 0, 0] ** 0.5)
    np.testing.assert_allclose(found.weight, wanted.weights_[order])


def test_equal_posteriors_are_taken_in_the_order_of_the_pairs():
    mixture = Mixture((0.0, 1.0), (0.01, 0.3), (0.5, 0.5), 0.0)
    score_N = np.array([0.9, 1.1, 0.01, 0.8, 1.0], np.float32)  # all but one have a posterior of 1.0
    assert (mixture.posterior(score_N)[[0, 1, 3, 4]] == 1).all()
    assert select_top(score_N, 2, mixture.rank).tolist() == [True, True, False, False, False]


@pytest.fixture
def samples(make_shards, tmp_path):
    return Samples(build_index([str(path) for path in make_shards([24, 24])], tmp_path / "index"))


def test_both_losses_read_two_augmented_views_and_scoring_the_first_kind(paper, samples):
    config = paper("train.batch_size=8", "data.eda_synonyms=table")
    views = make_views(config)
    unimodal, step = (
        epoch_steps(
            curriculum(config.train, 1, samples.index.samples // config.train.batch_size)[n],
            samples.index.counts,
            None,
            config,
        )[0]
        for n in (0, 5)
    )

    def batch(epoch):
        return TrainBatches(samples, [step], views, seed=0, epoch=epoch)[0]

    seen = TrainBatches(samples, [unimodal], views, seed=0, epoch=0)[0]
    plain = PlainBatches(samples, [(seen.rows, seen.rows)], views)[0]
    assert unimodal.loss == "unimodal" and seen.images.shape[0] == seen.tokens.shape[0] == 16
    for pictures in seen.images.chunk(2):  # both views are augmented
        assert (pictures != plain.images).flatten(1).any(1).all()
    first, later = batch(5), batch(6)
    assert step.loss == "clip" and first.images.shape[0] == 16 and first.tokens.shape[0] == 16
    (pictures1, pictures2), (captions1, captions2) = first.images.chunk(2), first.tokens.chunk(2)
    assert (pictures1 != pictures2).flatten(1).any(1).all() and (captions1 != captions2).any()
    # Pictures are drawn anew in every epoch, the variants of a caption once for the run.
    assert (first.images != later.images).flatten(1).any(1).all() and torch.equal(first.tokens, later.tokens)

    def scored(epoch):
        rows = first.rows
        return PlainBatches(samples, [(rows, rows)], replace(views, scored_as=(0, epoch)))[0]

    plain = PlainBatches(samples, [(first.rows, first.rows)], views)[0]
    assert torch.equal(scored(6).tokens, captions1) and torch.equal(scored(6).images, scored(6).images)
    assert (scored(6).images != plain.images).flatten(1).any(1).all()
    assert (scored(6).images != scored(7).images).flatten(1).any(1).all()
