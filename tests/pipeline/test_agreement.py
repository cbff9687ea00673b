"""Agreement: what neighbours say of a pair, against the plainest possible computation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from pipeline.config import Config
from pipeline.safety import scoring
from pipeline.safety.agreement import COPY, NEAREST, Voters, choose_voters
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.demo import shapes
from shards.errors import BadSample, UserError
from shards.index import ShardIndex, build_index
from shards.samples import Samples
from tests.pipeline.test_run import MODEL
from tests.ranks import run_ranks

DIM, SCALE = 8, 14.0


def pairs(count, seed):
    """Unit embeddings of pictures and captions, some pictures near copies of another."""
    rng = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(count, DIM, generator=rng), dim=1) for _ in range(2))
    copies = slice(count // 2, count // 2 + 3)
    image[copies] = normalize(image[:1] + 0.01 * torch.randn(3, DIM, generator=rng), dim=1)
    return image, normalize(text + image, dim=1)


def plainly(image, text, row, voters):
    """The three terms of one pair, as the module's text says them."""
    others = [v for v in voters if v != row]
    by_caption = sorted(others, key=lambda v: -float(text[row] @ text[v]))[:NEAREST]
    unlike = [v for v in others if float(image[row] @ image[v]) <= COPY]
    by_picture = sorted(unlike, key=lambda v: -float(image[row] @ image[v]))[:NEAREST]
    logs = [
        np.log(sum(np.exp(SCALE * float(here @ there[v])) for v in voters))
        for here, there in ((image[row], text), (text[row], image))
    ]
    return (
        SCALE * float(image[row] @ text[row]) - np.mean(logs),
        np.mean([float(image[row] @ image[v]) for v in by_caption]),
        np.mean([float(text[row] @ text[v]) for v in by_picture]),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 80), st.integers(25, 40), st.integers(0, 1000))
def test_the_terms_are_what_the_text_says(count, voters, seed):
    image, text = pairs(count, seed)
    row_V = torch.from_numpy(choose_voters(count, voters, seed))
    found = Voters(row_V, image[row_V], text[row_V], SCALE).terms(torch.arange(count), image, text)
    expected = [plainly(image, text, row, row_V.tolist()) for row in range(count)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-4)


def test_a_pair_that_others_contradict_scores_lower_than_one_of_the_same_cosine_that_they_confirm():
    rng = np.random.default_rng(0)
    centre = normalize(torch.from_numpy(rng.normal(size=(4, 64)).astype(np.float32)), dim=1)
    kind = torch.arange(200) % 4
    image, text = (
        normalize(centre[kind] + 0.1 * torch.from_numpy(rng.normal(size=(200, 64)).astype(np.float32)), dim=1)
        for _ in range(2)
    )
    # The model has learnt a poisoned pair: its caption's embedding has moved to its picture. But what it says is of another kind.
    text_poison = normalize(centre[1] + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    image_poison = normalize(image[0] + text_poison, dim=0)
    voters = Voters(torch.arange(200), image, text, SCALE)
    voters.standardise()
    score_N = voters.score(torch.arange(200), image, text)
    poison = voters.score(torch.tensor([-1]), image_poison[None], text_poison[None])
    assert float(image_poison @ text_poison) > 0.6 and (score_N > poison).float().mean() > 0.95
    assert abs(float(score_N.mean())) < 0.01 and (score_N.abs() <= 6).all()


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_handful_of_voters_gives_finite_scores(count):
    image, text = pairs(12, 0)
    voters = Voters(torch.arange(count), image[:count], text[:count], SCALE)
    voters.standardise()
    assert voters.score(torch.arange(12), image, text).isfinite().all()


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(0, 2**32))
def test_voters_are_different_rows_in_order(samples, count, seed):
    row_V = choose_voters(samples, count, seed)
    assert len(row_V) == min(count, samples) and (np.diff(row_V) > 0).all() and 0 <= row_V[0] and row_V[-1] < samples
    np.testing.assert_array_equal(row_V, choose_voters(samples, count, seed))


SOME = np.arange(3, 130, 3)


def scored(folder):
    samples = Samples(ShardIndex.load(folder / "shapes" / "index"))
    config = Config()
    config.model.config = MODEL
    torch.manual_seed(0)
    towers = Towers(build_model({"config": MODEL}), *pixel_stats())
    arguments = towers, samples, make_views(config), 16, torch.device("cpu")
    voters = scoring.gather_voters(*arguments, 50, 3)
    some = [scoring.score_some_pairs(*arguments, row_S, voters) for row_S in (SOME, SOME[:5], SOME[:0])]
    return voters, scoring.score_all_pairs(*arguments, voters=voters)[0].copy(), some


def test_two_ranks_get_the_voters_and_scores_of_one(tmp_path):
    shapes(tmp_path / "shapes", pairs=130, test=36)
    voters, score_N, some = scored(tmp_path)
    assert np.isfinite(score_N).all() and len(voters.row_V) == 50
    for score_S, rows in zip(some, (SOME, SOME[:5], SOME[:0])):
        np.testing.assert_allclose(score_S, score_N[rows], atol=1e-5)
    for other, other_N, others in run_ranks(scored, 2, tmp_path):
        for one, two in zip(some, others):
            np.testing.assert_array_equal(one, two)
        assert torch.equal(other.image_VD, voters.image_VD) and torch.equal(other.text_VD, voters.text_VD)
        assert torch.equal(other.mean_3, voters.mean_3) and torch.equal(other.std_3, voters.std_3)
        np.testing.assert_array_equal(other_N, score_N)


def test_voters_that_cannot_be_read_are_named(make_shards, tmp_path):
    samples = Samples(build_index([str(path) for path in make_shards([3])], tmp_path / "index"))
    samples.image = samples.caption = unreadable
    config = Config()
    config.model.config = MODEL
    towers = Towers(build_model({"config": MODEL}), *pixel_stats())
    with pytest.raises(UserError, match="selection.voters: none of the 3 pairs can be read"):
        scoring.gather_voters(towers, samples, make_views(config), 16, torch.device("cpu"), 50, 3)


def unreadable(shard, position, least=None):
    raise BadSample("torn")
