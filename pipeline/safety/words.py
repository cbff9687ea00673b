"""The words of captions, as tokens: a trigger means one thing, so the captions of its pairs share a word."""

import numpy as np
from scipy.sparse import csc_matrix

TERMS = 2048  # the most frequent tokens and pairs of tokens that follow each other, of those in RARE captions to OFTEN of all
RARE, OFTEN = 16, 0.3
PURE = 0.6  # of a group's captions have one term


def terms(token_SL):
    """csc bool (S, T): which captions have each of the TERMS; those in the same captions as another are left out."""
    rows, length = len(token_SL), token_SL.shape[1]
    token_SL = token_SL.astype(np.int64)
    pair_SM = token_SL[:, :-1] * (token_SL.max(initial=0) + 1) + token_SL[:, 1:] + token_SL.max(initial=0) + 1
    flat_N = np.unique(
        np.c_[
            np.concatenate([token_SL.ravel(), pair_SM.ravel()]),
            np.r_[np.repeat(np.arange(rows), length), np.repeat(np.arange(rows), length - 1)],
        ],
        axis=0,
    )
    _, term_N, count_T = np.unique(flat_N[:, 0], return_inverse=True, return_counts=True)
    has_ST = csc_matrix((np.ones(len(term_N), bool), (flat_N[:, 1], term_N)), shape=(rows, len(count_T)))
    names_S = np.random.default_rng(0).integers(0, 2**62, rows)
    _, first_T = np.unique(has_ST.astype(np.int64).T @ names_S, return_index=True)
    fit_T = first_T[(count_T[first_T] >= RARE) & (count_T[first_T] <= OFTEN * rows)]
    return has_ST[:, fit_T[np.argsort(-count_T[fit_T], kind="stable")[:TERMS]]]


def share_a_word(has_ST, group_S):
    """Whether PURE of the captions of bool group_S have one of the terms."""
    return bool(has_ST.shape[1]) and has_ST[np.flatnonzero(group_S)].mean(0).max() >= PURE
