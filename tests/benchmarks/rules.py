"""The command line with another rule of selection: python -m tests.benchmarks.rules RULE train CONFIG ...

Each rule is a variant of `tests.benchmarks.selection` and no setting of a config; RULES says what it does. In one process and one
piece only: what a rule remembers between splits is not on disk.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from scipy.stats import binom, binomtest
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import radius_neighbors_graph

from pipeline import cli
from pipeline.safety import agreement, split
from pipeline.safety.canaries import passing
from pipeline.safety.selection import RANGES
from pipeline.training import run as running
from pipeline.training import splitting
from shards.augment import plain_view
from shards.masks import SafeMask

honest_scores, honest_split, honest_mask = splitting.scores_for, splitting.split_pairs, splitting.mask_for
ALLOWED = 0.05  # of the canaries may pass: Wilson's lower bound
CLUSTERS = 64  # of pictures, and of captions
NEAR = 0.02 * 192**0.5  # distance of two pictures of 8 x 8 pixels: 2 % in each number, so that they are near-duplicates
SURPRISE = 1e-6  # probability below which pairs of one group come in together
ALERT = 1e-3  # the same for the brake, so that it rings at all


def cross_fit():
    """each pair is scored only after an epoch that left it out: two folds that take turns, in the slow epochs too"""
    hold_out(2, lambda run: np.arange(run.index.samples))


def cross_fit_ring():
    """the same with four folds in a ring, so that an epoch has three quarters of the pairs"""
    hold_out(4, lambda run: np.arange(run.index.samples))


def cross_fit_groups():
    """the same with two folds of clusters of pictures and captions, so that pairs that are like it are left out with a pair"""
    hold_out(2, groups)


def hold_out(folds, group_of):
    """Every epoch leaves one fold of the groups out of the CLIP loss, and only that fold is scored anew after it. What a pair is ranked
    by is the mean of such scores, over splits, as the agreement is. At the first split all are scored."""
    kept = {}

    def fold_of(run):
        if "fold" not in kept:
            group_N = group_of(run)
            fold_G = np.random.default_rng(run.config.run.seed).integers(folds, size=group_N.max() + 1)
            kept.update(fold=fold_G[group_N], sum=np.zeros(len(group_N)), times=np.zeros(len(group_N), int), fair=set())
        return kept["fold"]

    def scores_for(run, epoch, *rest):
        raw_N, canary_C, _, suspicion = honest_scores(run, epoch, *rest)
        fold_N, high = fold_of(run), RANGES[run.config.selection.score][1]
        for fold in range(folds):
            if epoch.split and fold != epoch.number % folds:
                continue  # trained on in the last epoch: what stood before stays
            here_N = fold_N == fold
            # Two models' scores are not on one scale.
            score = (raw_N[here_N] - np.nanmean(raw_N[here_N])) / np.nanstd(raw_N[here_N])
            if fold not in kept["fair"]:  # what stood there, if anything, was of pairs that had been trained on
                kept["sum"][here_N], kept["times"][here_N] = 0, 0
            if fold == epoch.number % folds:
                kept["fair"].add(fold)
            kept["sum"][here_N] += score
            kept["times"][here_N] += 1
        score_N = kept["sum"] / kept["times"]
        canary_C = (canary_C - np.nanmean(raw_N)) / np.nanstd(raw_N)
        fit = [np.clip(x * high / 8, -high, high).astype(np.float32) for x in (score_N, canary_C)]
        return *fit, int(kept["times"].max()), suspicion

    def mask_for(run, epoch, stop):
        mask, out = honest_mask(run, epoch, stop), fold_of(run) == (epoch.number + 1) % folds
        flags_N = mask.flags() if mask else np.ones_like(out)
        return SafeMask.from_flags(run.index.counts, flags_N & ~out)

    splitting.splits_so_far = lambda *rest: 0  # the mean is taken here
    splitting.scores_for, running.mask_for = scores_for, mask_for


def one_caption():
    """of pairs whose pictures are near-duplicates only one, another each epoch, is trained on"""
    kept = {}

    def mask_for(run, epoch, stop):
        if not kept:
            near = radius_neighbors_graph(thumbnails(run), NEAR)
            kept["of"] = connected_components(near, directed=False)[1]
        mask = honest_mask(run, epoch, stop)
        flags_N = mask.flags() if mask else np.ones(run.index.samples, bool)
        row_M = np.random.default_rng([run.config.run.seed, epoch.number]).permutation(np.flatnonzero(flags_N))
        one_N = np.zeros_like(flags_N)
        one_N[row_M[np.unique(kept["of"][row_M], return_index=True)[1]]] = True
        run.journal.say(f"    {flags_N.sum() - one_N.sum():,} pairs wait, as their picture is another's near-duplicate")
        return SafeMask.from_flags(run.index.counts, one_N)

    running.mask_for = mask_for


def nce():
    """the score is the contrast with the voters' captions and pictures alone"""

    def score(self, row_B, image_BD, text_BD):
        return (self.terms(row_B, image_BD, text_BD)[:, 0] / 4 + 3).clamp(-6, 6)  # into the range, in the same order

    agreement.Voters.score = score


def frozen():
    """the neighbours' two terms of the agreement, in the towers' spaces as the unimodal epoch left them"""
    before, honest_evaluate = {}, running.evaluate

    def evaluate(run, epoch, *rest):
        if epoch.stage == "unimodal":
            before.update({name: value.clone() for name, value in run.engine.module.state_dict().items()})
        return honest_evaluate(run, epoch, *rest)

    def score(self, row_B, image_BD, text_BD):
        by_image_BV, by_text_BV = image_BD @ self.image_VD.T, text_BD @ self.text_VD.T
        own_BV = row_B[:, None] == self.row_V
        copy_BV = own_BV | (by_image_BV > agreement.COPY * image_BD.norm(dim=1)[:, None] * self.image_VD.norm(dim=1))
        near_text_BK, near_image_BK = (
            self.nearest(x.masked_fill(no, -2)) for x, no in ((by_text_BV, own_BV), (by_image_BV, copy_BV))
        )
        pictures_B = by_image_BV.gather(1, near_text_BK).mean(1) - by_image_BV.mean(1)
        captions_B = by_text_BV.gather(1, near_image_BK).mean(1) - by_text_BV.mean(1)
        return ((pictures_B + captions_B) * 3).clamp(-6, 6)

    def scores_for(run, *rest):
        now = {name: value.clone() for name, value in run.engine.module.state_dict().items()}
        run.engine.module.load_state_dict(before)
        found = honest_scores(run, *rest)
        run.engine.module.load_state_dict(now)
        return found

    agreement.Voters.score, running.evaluate, splitting.scores_for = score, evaluate, scores_for


def weight_cap():
    """the safe share is at most the weight of the mixture's higher component"""
    honest = split.decide

    def decide(*words):
        mixture, share, *rest = honest(*words)
        return mixture, min(share, mixture.weight[1]) if mixture else share, *rest

    split.decide = decide


def canary_brake():
    """the safe share shrinks until Wilson's lower bound of the static canaries that pass is 5 %"""

    def split_pairs(score_N, counts_S, selection, number, first_share=None, before=None, canary_C=(), live=None):
        low = [passing(canary_C, cut)["low"] for cut in np.sort(canary_C)]
        cut = np.sort(canary_C)[np.argmax(np.array(low) <= ALLOWED)]
        cap = min(selection.cap, float(np.mean(score_N >= cut)))
        first_share = None if first_share is None else min(first_share, cap)
        return honest_split(score_N, counts_S, replace(selection, cap=cap), number, first_share, before, canary_C, live)

    splitting.split_pairs = split_pairs


def live_canary_brake():
    """the safe share goes back, split by split, until Wilson's lower bound of each kind of live canaries that pass is 5 %"""

    def split_pairs(score_N, counts_S, selection, number, first_share=None, before=None, canary_C=(), live=None):
        share = min(selection.cap, (first_share or selection.first_share) + number * selection.growth)
        while True:
            cut = np.sort(score_N)[::-1][round(share * len(score_N)) - 1]
            low = [
                binomtest(int((score_N[row_L] >= cut).sum()), len(row_L)).proportion_ci(method="wilson").low
                for row_L in live.values()
            ]
            if max(low) <= ALLOWED or share <= selection.growth:
                break
            share -= selection.growth
        limits = replace(selection, cap=share)
        return honest_split(score_N, counts_S, limits, number, first_share, before, canary_C, live)

    splitting.split_pairs = split_pairs


def thumbnails(run):
    """float64 (N, 192): the pictures at 8 x 8 pixels, 0 to 1."""
    places = zip(*(x.tolist() for x in run.index.place(np.arange(run.index.samples))))
    return np.stack([plain_view(run.samples.image(*place), 8).ravel() for place in places]) / 255


def groups(run):
    """int64 (N,): a number for each pair, the same for those whose pictures, at 8 x 8 pixels, and whose captions' words are in one cluster."""
    samples, index = run.samples, run.index
    places = zip(*(x.tolist() for x in index.place(np.arange(index.samples))))
    words_NW = TfidfVectorizer().fit_transform([samples.caption(*place) for place in places])
    clusters = KMeans(CLUSTERS, n_init=1, random_state=0)
    by_word, by_pixel = (clusters.fit_predict(x) for x in (words_NW, thumbnails(run)))
    return by_pixel * CLUSTERS + by_word


def alarms(flags_N, before_N, group_N, surprise):
    """bool (N,): pairs that come in with more of their group than chance brings (binomial, of all that come in)."""
    new_N = flags_N & ~before_N
    free_G = np.bincount(group_N, ~before_N, CLUSTERS**2)
    new_G = np.bincount(group_N, new_N, CLUSTERS**2)
    odds = new_N.sum() / max(1, (~before_N).sum())
    return new_N & (binom.sf(new_G - 1, free_G, odds) < surprise)[group_N]


def flip_brake():
    """the safe set stays as it is where a group of pairs would come in at once"""
    watch(lambda alarmed_N, flags_N, before_N: before_N if alarmed_N.any() else flags_N, ALERT)


def cluster_alarm():
    """groups of pairs that come in at once are held back, until they come in one by one"""
    watch(lambda alarmed_N, flags_N, before_N: flags_N & ~alarmed_N, SURPRISE)


def watch(rule, surprise):
    """Let `rule` change every split's flags, knowing those of the last one and what would come in in groups since."""
    kept = {}

    def scores_for(run, *rest):
        if not kept:
            kept["group"] = groups(run)
        return honest_scores(run, *rest)

    def split_pairs(score_N, counts_S, *rest):
        found = honest_split(score_N, counts_S, *rest)
        flags_N = found.mask.flags()
        if "before" in kept:
            alarmed_N = alarms(flags_N, kept["before"], kept["group"], surprise)
            flags_N = rule(alarmed_N, flags_N, kept["before"])
            found.note += f"{alarmed_N.sum()} pairs would come in in groups"
            found.mask = SafeMask.from_flags(counts_S, flags_N)
            found.share = found.mask.share
        kept["before"] = flags_N
        return found

    splitting.scores_for, splitting.split_pairs = scores_for, split_pairs


def continuous_rate():
    """after the slow epochs the learning rate rises in an epoch's steps, instead of at once"""
    honest = running.learning_rate

    def learning_rate(step, epoch, steps_per_epoch, train):
        rate = honest(step, epoch, steps_per_epoch, train)
        first = (train.unimodal_epochs + train.slow_epochs) * steps_per_epoch
        if epoch.stage == "safeclip" and step < first + steps_per_epoch:
            rate = train.slow_lr + (rate - train.slow_lr) * (step - first + 1) / steps_per_epoch
        return rate

    running.learning_rate = learning_rate


RULES = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        cross_fit,
        cross_fit_ring,
        cross_fit_groups,
        one_caption,
        nce,
        frozen,
        weight_cap,
        canary_brake,
        live_canary_brake,
        flip_brake,
        cluster_alarm,
        continuous_rate,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    RULES[sys.argv.pop(1)]()
    cli.main()
