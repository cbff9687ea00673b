"""The words of captions, as tokens: a trigger means one thing, so the captions of its pairs share a word."""

import numpy as np
from scipy.sparse import csc_matrix

TERMS = 2048  # the most frequent tokens and pairs of tokens that follow each other, of those in RARE captions to OFTEN of all
RARE, OFTEN = 16, 0.3
PURE = 0.6  # of a group's captions have one term


def terms(token_SL):
    """csc bool (S, T): which captions have each of the TERMS; those in the same captions as another are left out."""
    rows, token_SL = len(token_SL), token_SL.astype(np.int64)
    above = token_SL.max(initial=0) + 1
    all_SN = np.concatenate([token_SL, (token_SL[:, :-1] + 1) * above + token_SL[:, 1:]], 1)
    _, term_SN = np.unique(all_SN, return_inverse=True)
    row_SN = np.repeat(np.arange(rows), all_SN.shape[1])
    shape = rows, term_SN.max(initial=-1) + 1
    has_ST = csc_matrix((np.ones(all_SN.size, bool), (row_SN, term_SN.ravel())), shape=shape)
    has_ST.sum_duplicates()
    count_T = np.diff(has_ST.indptr)
    names_S = np.random.default_rng(0).integers(0, 2**62, rows)
    _, first_T = np.unique(has_ST.astype(np.int64).T @ names_S, return_index=True)
    fit_T = first_T[(count_T[first_T] >= RARE) & (count_T[first_T] <= OFTEN * rows)]
    return has_ST[:, fit_T[np.argsort(-count_T[fit_T], kind="stable")[:TERMS]]]


def share_a_word(has_ST, group_S):
    """Whether PURE of the captions of bool group_S have one of the terms."""
    return bool(has_ST.shape[1]) and has_ST[np.flatnonzero(group_S)].mean(0).max() >= PURE
