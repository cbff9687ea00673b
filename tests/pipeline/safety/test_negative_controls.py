"""Negative controls: mismatched pairs, scored as training pairs are, and what their fraction tells."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config, Selection
from pipeline.safety.negative_controls import choose, passing, score_controls
from pipeline.safety.round import select_pairs
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.build.shapes import shapes
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from shards.views.augment import plain_view
from tests.helpers.models import MODEL


@given(st.integers(0, 3000), st.integers(0, 600), st.integers(0, 2**32))
def test_no_row_is_in_two_controls_and_the_seed_decides(samples, count, seed):
    picture_C, caption_C = choose(samples, count, seed)
    rows = np.concatenate([picture_C, caption_C])
    assert len(picture_C) == len(caption_C) == min(count, samples // 2)
    assert len(set(rows.tolist())) == len(rows) and (rows < samples).all() and (rows >= 0).all()
    np.testing.assert_array_equal(choose(samples, count, seed)[0], picture_C)


def test_each_is_the_cosine_of_one_pairs_picture_and_anothers_caption(tmp_path):
    shapes(tmp_path / "shapes", pairs=60, test=36)
    config = Config()
    config.model.config = MODEL
    samples, views = Samples(ShardIndex.load(tmp_path / "shapes" / "index")), make_views(config)
    torch.manual_seed(0)
    towers = Towers(build_model({"config": MODEL}), *pixel_stats()).train()
    found_C = score_controls(towers, samples, views, 8, torch.device("cpu"), 20, 7)
    assert towers.training and len(found_C) == 20
    towers.eval()
    for control, (picture, caption) in enumerate(zip(*choose(60, 20, 7))):
        pixels = torch.from_numpy(plain_view(samples.image(0, int(picture)), views.size).copy()).permute(2, 0, 1)
        with torch.no_grad():
            image_BD, text_BD, _ = towers(pixels[None], views.tokenize([samples.caption(0, int(caption))]))
        assert found_C[control] == pytest.approx(float((image_BD * text_BD).sum()), abs=1e-5)


def test_the_fraction_that_passes_has_wilsons_interval():
    found = passing(np.array([0.1, 0.5, 0.3, np.nan, 0.3] + [0.0] * 6, np.float32), np.float32(0.3))
    assert (found["count"], found["passed"], found["fraction"]) == (10, 3, 0.3)
    z, n, p = 1.959964, 10, 0.3
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["low"] == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-5)
    assert found["high"] == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-5)


@pytest.mark.parametrize("shift, blunt", [(-1.0, False), (-0.2, False), (0.0, True)])
def test_scores_that_hardly_tell_controls_from_pairs_are_told(shift, blunt):
    rng = np.random.default_rng(0)
    score_N, control_C = (rng.uniform(0, 0.5, count).astype(np.float32) for count in (1_000, 200))
    selected = select_pairs(score_N, [1_000], Selection(first_fraction=0.5), 0, control_C=control_C + np.float32(shift))
    assert ("the scores hardly tell wrong captions" in selected.note) == blunt
