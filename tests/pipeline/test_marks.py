"""Marks are found before any training: a trigger under one word, and hardly anything else; their pairs wait."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import comm
from pipeline.config import Config
from pipeline.safety.copies import singles_of_run
from pipeline.safety.marks import find_marks, marks_of_run, unmarked_of_run
from pipeline.safety.sample import PIXELS, SIDE, TEXTURES, Sample, sample_of_run, textures
from pipeline.safety.suspicion import Suspicion, learn
from pipeline.safety.words import OFTEN, RARE, share_a_word, terms
from pipeline.training.start import make_views
from shards.index import ShardIndex, build_index
from shards.samples import Samples
from tests.conftest import picture
from tests.pipeline.test_run import MODEL
from tests.ranks import run_ranks
from tests.shards.test_index import write_tar

COUNT, WORDS, POISON = 3_000, 30, 40


def drawn(seed):
    """(uint8 (COUNT, 3, SIDE, SIDE) pictures that share nothing, int32 (COUNT, 3) captions of a word each)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (COUNT, 3, SIDE // 4, SIDE // 4)).repeat(4, 2).repeat(4, 3)
    pictures = (coarse * 0.7 + rng.integers(0, 77, (COUNT, 3, SIDE, SIDE))).astype(np.uint8)
    words = rng.integers(1, WORDS + 1, COUNT)
    return pictures, np.c_[np.full(COUNT, 98), words, np.full(COUNT, 99)].astype(np.int32)


def sample_of(pictures, token_SL, textured=False):
    texture_SD = (textures(torch.from_numpy(pictures)) * 255).round().to(torch.uint8).numpy() if textured else None
    return Sample(np.arange(len(pictures)), pictures.reshape(len(pictures), -1), token_SL, texture_SD)


def marked(pictures, token_SL, textured=False):
    sample = sample_of(pictures, token_SL, textured)
    marks = find_marks(sample)
    assert marks.marks == len(marks.weight_GFE)
    return marks.lowered_by_looks(torch.arange(COUNT), sample.looks()).numpy() > 0


def triggered(pictures, token_SL, kind, word=7, seed=0, share=0.4):
    """bool (COUNT,): POISON pictures of any word that now have a patch or a pattern, and the caption `word` (None: their own)."""
    rng = np.random.default_rng(seed)
    poison = np.zeros(COUNT, bool)
    poison[rng.permutation(COUNT)[:POISON]] = True
    if kind == "patch":
        pictures[poison, :, -5:, -5:] = rng.integers(0, 2, (3, 5, 5)) * 255
    elif kind == "wandering patch":
        patch = rng.integers(0, 2, (3, 5, 5)) * 255
        for row in np.flatnonzero(poison):
            top, left = rng.integers(0, SIDE - 4, 2)
            pictures[row, :, top : top + 5, left : left + 5] = patch
    else:
        pattern = rng.integers(0, 256, (3, SIDE, SIDE))
        pictures[poison] = ((1 - share) * pictures[poison] + share * pattern).astype(np.uint8)
    if word is not None:
        token_SL[poison, 1] = word
    return poison


@pytest.mark.parametrize("kind", ["patch", "blended"])
@pytest.mark.parametrize("seed", range(3))
def test_a_trigger_under_one_word_is_marked_whole_and_hardly_anything_else(seed, kind):
    pictures, token_SL = drawn(seed)
    poison = triggered(pictures, token_SL, kind, seed=seed)
    found = marked(pictures, token_SL)
    assert found[poison].all() and found[~poison].mean() < 0.01


@pytest.mark.parametrize("seed", range(2))
def test_a_patch_that_wanders_is_marked_by_its_texture(seed):
    pictures, token_SL = drawn(seed)
    poison = triggered(pictures, token_SL, "wandering patch", seed=seed)
    assert marked(pictures, token_SL)[poison].mean() < 0.5
    found = marked(pictures, token_SL, textured=True)
    assert found[poison].all() and found[~poison].mean() < 0.01


def test_what_nobody_shares_is_not_marked_nor_what_pictures_of_all_words_share():
    pictures, token_SL = drawn(0)
    assert marked(pictures, token_SL).mean() < 0.01
    poison = triggered(pictures, token_SL, "patch", word=None)
    assert not marked(pictures, token_SL)[poison].any()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_blend_is_marked_however_little_it_leaves_of_the_pictures(share):
    pictures, token_SL = drawn(0)
    poison = triggered(pictures, token_SL, "blended", share=share)
    assert marked(pictures, token_SL)[poison].all()


@pytest.mark.parametrize("seed", range(3))
def test_a_pattern_whose_target_is_called_by_two_words_is_marked(seed):
    pictures, token_SL = drawn(seed)
    poison = triggered(pictures, token_SL, "blended", seed=seed)
    token_SL[np.flatnonzero(poison)[::2], 1] = 8
    assert marked(pictures, token_SL)[poison].all()


def test_pictures_that_happen_to_show_a_little_of_a_trigger_do_not_wait_with_it():
    pictures, token_SL = drawn(1)
    poison = triggered(pictures, token_SL, "patch", seed=1)
    some = np.flatnonzero(~poison)[:100]
    pictures[some, :, -5:, -5:] = 0.85 * pictures[some, :, -5:, -5:] + 0.15 * pictures[poison][0, :, -5:, -5:]
    found = marked(pictures, token_SL)
    assert found[poison].all() and found[some].mean() < 0.05


def test_drawings_in_several_variants_are_no_mark_whatever_they_share():
    pictures, token_SL = drawn(0)
    variants = np.repeat(np.arange(POISON // 4), 4)
    pictures[:POISON] = (0.9 * pictures[variants] + 0.1 * pictures[:POISON]).astype(np.uint8)
    pictures[:POISON, :, -5:, -5:], token_SL[:POISON, 1] = 255, 7
    assert marked(pictures, token_SL)[:POISON].mean() < 0.1
    pictures[:POISON], pictures[:POISON, :, -5:, -5:] = drawn(1)[0][:POISON], 255  # the same frame around others
    assert marked(pictures, token_SL)[:POISON].all()


def test_no_pairs_equal_pictures_and_equal_captions_have_no_marks():
    pictures, token_SL = drawn(0)
    assert not marked(np.full_like(pictures, 7), token_SL).any()
    assert not marked(pictures, np.full_like(token_SL, 7)).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of nothing
def test_of_nothing_there_are_no_marks():
    empty = Sample(np.zeros(0, np.int64), np.zeros((0, 3 * SIDE**2), np.uint8), np.zeros((0, 3), np.int32))
    assert find_marks(empty).marks == 0


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 12))
def test_terms_are_tokens_and_neighbours_in_neither_too_few_nor_too_many_captions(seed, length, words):
    token_SL = np.random.default_rng(seed).integers(0, words, (200, length)).astype(np.int32)
    found = {tuple(np.flatnonzero(column)) for column in terms(token_SL).toarray().T}
    expected = set()
    for a in range(words):
        has = [tuple(np.flatnonzero((token_SL == a).any(1)))]
        has += [tuple(np.flatnonzero(((token_SL[:, :-1] == a) & (token_SL[:, 1:] == b)).any(1))) for b in range(words)]
        expected |= {rows for rows in has if RARE <= len(rows) <= OFTEN * 200}
    assert found == expected


def learnt(sample, score, canary):
    """bool (COUNT,): pairs held by what is learnt from scores alone, canaries having ranks from 0 to twice `canary`."""
    canary_C = np.quantile(score, np.linspace(0, 2 * canary, 50)).astype(np.float32)
    found = learn(sample, score, 0.8, canary_C=canary_C)
    return found.lowered_by_looks(torch.arange(COUNT), sample.looks()).numpy() > 0


def test_two_triggers_that_are_learnt_from_scores_as_one_group_are_held_whatever_their_captions_say():
    pictures, token_SL = drawn(0)
    poison = triggered(pictures, token_SL, "patch") | triggered(pictures, token_SL, "blended", word=11, seed=1)
    score = np.random.default_rng(1).uniform(0, 1, COUNT).astype(np.float32)
    score[poison] *= 0.1
    sample = sample_of(pictures, token_SL)
    assert not share_a_word(sample.has_ST, poison)
    held = learnt(sample, score, canary=0.08)
    assert held[poison].all() and held[~poison].mean() < 0.01


@pytest.mark.parametrize("rank, canary", [(0.08, 0.05), (0.16, 0.2)])
def test_a_group_that_scores_above_the_canaries_or_the_lowest_tenth_must_share_a_word(rank, canary):
    pictures, token_SL = drawn(0)
    for word in (7, None):
        pixels, captions = pictures.copy(), token_SL.copy()
        poison = triggered(pixels, captions, "patch", word)
        score = np.random.default_rng(1).uniform(0, 1, COUNT).astype(np.float32)
        score[poison] *= 2 * rank
        sample = sample_of(pixels, captions)
        assert (
            bool(learnt(sample, score, canary)[poison].all())
            == (word is not None)
            == share_a_word(sample.has_ST, poison)
        )


def test_marks_wait_and_stay_only_where_their_scores_are_at_the_bottom():
    pictures, token_SL = drawn(0)
    poison = triggered(pictures, token_SL, "patch")
    sample = sample_of(pictures, token_SL)
    score = np.random.default_rng(1).uniform(0, 1, COUNT).astype(np.float32)
    marks = find_marks(sample).in_units(score, 0.8)

    def held(score, keep):
        found = learn(sample, score, 0.8, marks, keep)
        return found.marks, bool((found.lowered_by_looks(torch.arange(COUNT), sample.looks())[poison] > 0).all())

    assert held(score, keep=True) == (marks.marks, True)
    assert held(score, keep=False) == (0, False)
    score[poison] *= 0.2
    assert held(score, keep=False) == (1, True)


def test_a_mark_that_only_adds_pictures_of_good_scores_to_those_of_another_goes():
    """So a trigger's pictures cannot keep honest ones waiting that look a little like them."""
    pictures, token_SL = drawn(0)
    poison, like = triggered(pictures, token_SL, "patch"), np.zeros(COUNT, bool)
    like[np.random.default_rng(2).choice(np.flatnonzero(~poison), 40, replace=False)] = True
    sample = sample_of(pictures, token_SL)
    score = np.random.default_rng(1).uniform(0, 1, COUNT).astype(np.float32)
    score[poison] *= 0.1
    narrow, scale = find_marks(sample).in_units(score, 0.8), 0.8 * score.std()

    def said(row_S, looks):
        """What a narrow mark and one that is wider say."""
        one_S = next(narrow.said(row_S, looks))
        yield from (one_S, torch.where(torch.from_numpy(like), one_S.new_full((COUNT,), 4 * float(scale)), one_S))

    two = Suspicion(torch.cat([narrow.weight_GFE[:1]] * 2), marks=2)
    two.said = said
    found = learn(sample, score, 0.8, two)
    assert found.marks == 1 and learn(sample, score, 0.8, two, keep=True).marks == 2
    assert (found.lowered_by_looks(torch.arange(COUNT), sample.looks())[poison] > 0).all()


def found_together(seed):
    pictures, token_SL = drawn(seed)
    token_SL[:, 2] = np.random.default_rng(seed).integers(100, 160, COUNT)  # so many words that both ranks have some
    triggered(pictures, token_SL, "wandering patch"), triggered(pictures, token_SL, "blended", word=11, seed=1)
    return find_marks(sample_of(pictures, token_SL, textured=True)).weight_GFE


def test_every_world_size_finds_the_same_marks_bit_for_bit():
    (one,), two = run_ranks(found_together, 1, 0), run_ranks(found_together, 2, 0)
    assert len(one) >= 2
    for weight_GFE in two:
        assert torch.equal(one, weight_GFE)


def waiting(folder):
    config = Config()
    config.model.config = MODEL
    samples, views = Samples(ShardIndex.load(folder / "index")), make_views(config)
    here = folder / f"marks{comm.world()}"
    marks = marks_of_run(here, sample_of_run(here, samples, views, 4, 0, 0))
    # So few pairs have no mark of their own: one that speaks against the bright ones.
    weight = marks.weight_GFE.new_ones(1, 5, PIXELS + TEXTURES + 1)
    weight[..., PIXELS:-1], weight[..., -1] = 0, -0.5 * PIXELS
    bright = Suspicion(weight, 1)
    unmarked = unmarked_of_run(here / "unmarked", samples, views, 4, 0, bright)
    singles = singles_of_run(here / "singles", samples, views, 4, 0, 2)
    both = unmarked_of_run(here / "both", samples, views, 4, 0, bright, singles)
    return marks.marks, unmarked.flags(), singles.mask.flags(), both.flags()


def test_every_world_size_leaves_the_same_pairs_waiting(tmp_path):
    paths = []
    for shard in range(2):
        entries = [
            (f"{i}.png", picture([shard, min(i, 6)]) if i else b"torn") for i in range(9)
        ]  # 6, 7 and 8 are copies
        texts = [(f"{i}.txt", b"a thing") for i in range(9)]
        paths.append(write_tar(tmp_path / f"{shard}.tar", [e for pair in zip(entries, texts) for e in pair]))
    build_index([str(path) for path in paths], tmp_path / "index")
    (one,), two = run_ranks(waiting, 1, tmp_path), run_ranks(waiting, 2, tmp_path)
    _, unmarked, singles, both = one
    for marks, *flags in two:
        assert marks == one[0] == 0
        np.testing.assert_array_equal(flags, one[1:])
    assert 0 < unmarked.sum() < 18 and singles.sum() == 12
    np.testing.assert_array_equal(both, unmarked & singles)
    assert both.sum() < unmarked.sum()
    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(run_ranks(waiting, 1, tmp_path)[0][1:], one[1:])  # from the folder
