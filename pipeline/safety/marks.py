"""Marks: one thing that pictures which differ share, under captions that share a word. Found before any training, from pixels and words alone.

A trigger is learnt from few steps of the CLIP loss, and once it is, its pairs score like honest ones and no score tells them (tests/benchmarks/trials.md).
So what could be one is looked for first. Of the pairs of each word those that lie furthest along a main direction of their pictures (after
whitening, both ways, PARTS directions) are learnt by ridge regression, and again those that it judges most alike (TAILS). Pictures with one trigger stand out
about as far as each other, and further than what else the direction has found, a colour or a shape that the word names: those that stand out half as far
(NEAR) as the clearest are a group. It is marked if it stands out from all pictures by many deviations, has that word in many of its captions (NAMED) and
differs in all else: once what all of it share is taken off, something is left (SAME), and few of its pictures have another that is like them. Of
series that belong together, one drawing in many variants, most have one.
A patch that stands elsewhere in each picture is in no direction of the pixels. So the same is done once more with textures (sample.py), which
do not know where a thing stands: what is found there beside is a mark from other bounds on (LOOKS): among more numbers a few pictures share some by chance.
Some marks are honest: a horizon under "sea", a frame. So a mark is no verdict but a probation: its pairs are left out of the slow
epochs and held back for PROBATION splits, while the model learns from all others what pictures show and words mean. Honest ones then score like others
and come in; a trigger means nothing to a model that has not learnt it, and stays (pipeline/safety/suspicion.py).
Cross-fitting (METHOD, "How it fails") by groups that a trigger cannot straddle. Legend: as in sample.py, and C directions.
"""

from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_matrix

from pipeline import comm
from pipeline.safety.copies import kept_mask, numbers_of_pictures
from pipeline.safety.sample import FLAT, RIDGE, Ridge, robust
from pipeline.safety.split import broadcast_mask
from pipeline.safety.suspicion import APART, FREE, LEAST, NOTHING, Suspicion, weights
from shards.errors import UserError

PARTS = 3
PICKED = 256  # pictures of a term that its directions are taken from
TAILS = 0.15, 0.15, 0.08  # of a term's pairs: the first along the direction, then those that are judged most alike
NEAR = 0.5  # of the deviations of the LEAST-th clearest picture: those of a group have more
NAMED = 0.4  # of a marked group's captions have the term: what is called by one name in zero-shot may have several in captions
SAME = 0.01  # of the variance of all pictures: a group that has less is one picture, many times
COMPARED = 64  # pictures of a group that are compared with each other, at most
MARKS = 64  # groups, the clearest first
TERMS_AT_ONCE = 32  # whose directions are fitted together


class Bounds(NamedTuple):
    """What a marked group must reach."""

    pictures: int  # at least
    clear: float  # deviations by which its middle one stands out, at least
    alike: float  # correlation of its middle one with the most alike other, at most
    new: float  # share of its pictures that no mark before it has, at least


LOOKS = Bounds(LEAST, 22.0, 0.4, 0.2), Bounds(20, 26.0, 0.55, 0.5)  # of pixels, of textures


def find_marks(sample):
    """Suspicion whose groups are the marks of a sample.Sample, in deviations: what it says of a picture is by how many it stands out beyond what is free.

    All ranks call, each with the whole sample: they share the terms, in pieces that are the same at every world size, and so are the bits."""
    found = []
    if len(sample.row_S):
        white_SD = whitened(sample)
        for look, bounds in zip(filter(None, (sample, sample.textures)), LOOKS):
            mine = marks_of_look(sample, look, white_SD, bounds)
            there = sum(sum(zip_longest(*comm.gather_objects(mine), fillvalue=[]), ()), [])
            found += [(*mark, bounds) for mark in sorted(there, key=lambda mark: -mark[0])]
    kept, covered_S = [], np.zeros(len(sample.row_S), bool)
    for _, row_N, weight_FE, bounds in found:
        if len(kept) < MARKS and (~covered_S[row_N]).sum() >= max(LEAST / 2, bounds.new * len(row_N)):
            kept.append(weight_FE)
            covered_S[row_N] = True
    return Suspicion.of(kept, marks=len(kept))


def marks_of_look(sample, look, white_SD, bounds):
    """[marks_of_terms] of this rank's pieces of the terms, by one look at the pictures: `look` is the sample itself or its textures.

    white_SD: the sample's whitened pixels, by which groups are compared."""
    ridge = Ridge(look, np.ones(len(look.row_S), bool), look.gram_FDD)
    white = white_SD if look is sample else whitened(look)
    pieces = range(0, sample.has_ST.shape[1], TERMS_AT_ONCE)[comm.rank() :: comm.world()]
    terms = [sample.has_ST[:, at : at + TERMS_AT_ONCE] for at in pieces]
    return [marks_of_terms(look, ridge, white, has_ST, partial(is_mark, white_SD, bounds)) for has_ST in terms]


def marks_of_terms(sample, ridge, white_SD, has_ST, mark):
    """[(how clear, int (N,) pictures of the sample, float (F, E) weights)] of the groups of some terms that mark(away_S, group_S, term_S) calls marks."""
    found = []
    term_CN, alike_CN = zip(*directions(white_SD, has_ST))
    for tail in TAILS[1:]:
        weight_FDC = ridge.fitted(columns(alike_CN, len(white_SD)))
        judged_CN = [ridge.judged(weight_FDC[:, :, [of]], row_N)[:, 0] for of, row_N in enumerate(term_CN)]
        alike_CN = [highest(*one, tail) for one in zip(judged_CN, term_CN)]
    term_SC = columns(term_CN, len(white_SD)).toarray()
    judged_SC = ridge.judged(ridge.fitted(columns(alike_CN, len(white_SD))))
    middle_C, spread_C = robust(judged_SC)
    weight_FDC = ridge.fitted((judged_SC > middle_C + APART * spread_C) & term_SC)
    for judged_S, term_S, weight_FD in zip(ridge.judged(weight_FDC).T, term_SC.T, np.moveaxis(weight_FDC, 2, 0)):
        middle, spread = robust(judged_S)
        if spread <= NOTHING:  # else rounding would be told apart
            continue
        away_S = (judged_S - middle) / spread
        apart = max(APART, NEAR * np.partition(away_S, -LEAST)[-LEAST])
        group_S = away_S > apart  # its pictures are marked from half as far on: of one trigger some stand out less
        if mark(away_S, group_S, term_S):
            constant_F = -(weight_FD @ sample.mean_D + middle) / spread - max(FREE, apart / 2)
            clear = float(np.median(away_S[group_S]))
            found.append((clear, np.flatnonzero(group_S), weights(weight_FD / spread, constant_F)))
    return found


def columns(row_CN, rows):
    """csc bool (rows, C), true in the rows that int row_CN lists."""
    ends = np.cumsum([0, *map(len, row_CN)])
    return csc_matrix((np.ones(ends[-1], bool), np.concatenate(row_CN), ends), shape=(rows, len(row_CN)))


def is_mark(white_SD, bounds, away_S, group_S, term_S):
    """Whether a group of pictures that stand out is many, clear, of the term, and of pictures that differ in all else."""
    if group_S.sum() < bounds.pictures or np.median(away_S[group_S]) < bounds.clear:
        return False
    if term_S[group_S].mean() < NAMED:
        return False
    white_ND = white_SD[group_S]
    return white_ND.var(0).mean() > SAME * white_SD.var(0).mean() and likeness(white_ND) < bounds.alike


def likeness(white_ND):
    """Correlation of the middle one of whitened pictures with the one most like it, once what all share, their mean, is taken off.

    A blend makes what is left of the pictures fainter, and no more alike. Of COMPARED random ones, for among more each finds one more like it."""
    white_ND = white_ND[np.random.default_rng(0).permutation(len(white_ND))[:COMPARED]]
    white_ND = white_ND - white_ND.mean(0)
    white_ND /= np.maximum(np.linalg.norm(white_ND, axis=1, keepdims=True), NOTHING)
    alike_NN = white_ND @ white_ND.T
    np.fill_diagonal(alike_NN, -1)
    return np.median(alike_NN.max(1))


def highest(value_N, row_N, share):
    """Those of int row_N with the `share` of the highest values, at least LEAST of them."""
    return row_N[np.argsort(-value_N, kind="stable")[: max(LEAST, int(share * len(row_N)))]]


def whitened(sample):
    """float32 (S, D): the sample's pictures, in numbers that are not correlated and of about variance 1."""
    gram_DD = sample.gram_FDD.sum(0, dtype=np.float64) / len(sample.row_S)
    ridge = RIDGE * np.trace(gram_DD) / len(gram_DD) + FLAT
    value_D, vector_DD = np.linalg.eigh(gram_DD + ridge * np.eye(len(gram_DD)))
    return sample.x_SD @ (vector_DD / np.sqrt(value_D)).astype(np.float32)


def directions(white_SD, has_ST):
    """Yield (int (N,) pairs of a term, those of them furthest along a direction): PARTS main directions of each, both ways."""
    for term in range(has_ST.shape[1]):
        row_N = has_ST.indices[has_ST.indptr[term] : has_ST.indptr[term + 1]]
        white_ND = white_SD[row_N] - white_SD[row_N].mean(0)
        picked_PD = white_ND[np.random.default_rng(0).permutation(len(row_N))[:PICKED]]
        _, _, main_PP = np.linalg.svd(picked_PD @ picked_PD.T)
        for along_D in main_PP[:PARTS] @ picked_PD:
            along_N = white_ND @ along_D
            yield row_N, highest(along_N, row_N, TAILS[0])
            yield row_N, highest(-along_N, row_N, TAILS[0])


def marks_of_run(folder, sample):
    """find_marks of the run's sample (on rank 0; None elsewhere), found once and kept in `folder`: Suspicion on every rank. All ranks call."""

    def there():
        try:
            return Suspicion.load(folder)
        except UserError:
            return None

    marks = comm.on_main(there)
    if marks is None:
        marks = find_marks(comm.broadcast_object(sample))
        comm.on_main(marks.save, folder)
    return marks


def unmarked_of_run(folder, samples, views, batch_size, workers, marks, singles=None):
    """SafeMask of the pairs without a mark, and only of `singles` where there are some, found once a run and kept in `folder`.

    Decodes every picture once. All ranks call."""
    index = samples.index

    def number(batch):
        return (marks.lowered_by(batch.rows, batch.images) > 0).numpy()

    def flags(marked_N):
        for shard, (start, stop) in enumerate(zip(index.offsets, index.offsets[1:])):
            unmarked = ~marked_N[start:stop]
            yield unmarked & singles.mask.shard_flags(shard) if singles else unmarked

    def find():
        marked_N = numbers_of_pictures(samples, views, batch_size, workers, number, np.bool_)
        return broadcast_mask(flags(marked_N) if comm.is_main() else (), index.counts)

    made = {"fingerprint": index.fingerprint, "marks": marks.marks, "copies": singles and singles.most}
    return kept_mask(folder, made, find)
