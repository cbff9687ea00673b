"""The views in which pairs are scored, and the mean of their cosines."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.safety.scoring import embed, scores
from pipeline.safety.views import ScoredViews
from shards.index import build_index
from shards.loader import Views
from shards.samples import Samples

SIDE = 32


def pictures(count=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), np.uint8))


def test_published_scoring_has_the_pictures_as_they_are():
    images = pictures()
    (only,) = ScoredViews()(images)
    assert only is images


def test_a_coarse_view_has_the_light_and_not_the_detail():
    checks = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = 200  # a pattern of single pixels
    plain, coarse = ScoredViews(coarse=0.25)(checks)
    assert plain is checks and (coarse.float() - 100).abs().max() < 12
    halves = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    halves[..., SIDE // 2 :] = 200
    seen = ScoredViews(coarse=0.25)(halves)[1].float()
    assert seen[..., :8].max() < 20 and seen[..., -8:].min() > 180


def test_the_middle_is_what_is_in_the_middle():
    images = pictures()
    framed = images.clone()
    framed[:, :, :4], framed[..., -4:] = 0, 255  # what stands at the border is not seen
    middle, same = (ScoredViews(crop=0.5)(x)[1] for x in (images, framed))
    assert (middle == same).all() and middle.shape == images.shape
    flat = torch.full((1, 3, SIDE, SIDE), 77, dtype=torch.uint8)
    assert (ScoredViews(crop=0.5)(flat)[1] == 77).all()


def test_mirrored_views_are_the_views_of_the_mirrored_pictures():
    images = pictures()
    for view, same in zip(ScoredViews(0.25, 0.6, mirror=True)(images), ScoredViews(0.25, 0.6)(images.flip(-1))):
        assert (view == same).all()


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.booleans(), st.integers(2, 40))
def test_views_are_pictures_of_the_same_size_and_a_row_knows_no_other(coarse, crop, mirror, side):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), np.uint8))
    views = ScoredViews(coarse, crop, mirror)
    together, alone = views(images), views(images[1:])
    assert len(together) == 1 + (coarse < 1) + (crop < 1)
    for both, one in zip(together, alone):
        assert both.shape == images.shape and both.dtype == torch.uint8 and (both[1:] == one).all()


def test_pictures_are_resized_as_floats_where_there_are_no_bytes(monkeypatch):
    """A GPU has no resize of bytes, which a fake one does not tell."""
    images, kinds, resize = pictures(), [], torch.nn.functional.interpolate
    expected = ScoredViews(0.2, 0.6)(images)
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, *a, **k: kinds.append(x.dtype) or resize(x, *a, **k)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        ScoredViews(0.2, 0.6)(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8, device="cuda"))
    assert kinds == [torch.float32] * 3
    few = resize(images.float(), (6, 6), mode="bicubic", antialias=True).round().clamp(0, 255)
    coarse = resize(few, (SIDE, SIDE), mode="bicubic", antialias=True)
    assert (coarse.round().clamp(0, 255) - expected[1].float()).abs().max() <= 3  # the same but for rounding


def test_views_stay_on_the_gpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8, device="cuda")
        assert {view.device.type for view in ScoredViews(0.2, 0.6, True)(images)} == {"cuda"}


class Means(torch.nn.Module):
    """A CLIP of no weights: a picture is its mean colour, a caption the colour that its tokens name."""

    def forward(self, images, tokens):
        image = torch.nn.functional.normalize(images.float().mean((2, 3)) + 1, dim=1)
        text = None if tokens is None else torch.nn.functional.normalize(tokens.float() + 1, dim=1)
        return image, text, torch.ones(1)


@pytest.mark.parametrize("scored", [ScoredViews(), ScoredViews(coarse=0.2, crop=0.3)])
def test_the_score_is_the_mean_of_the_views_cosines_and_the_cosine_that_of_the_picture_itself(
    make_shards, tmp_path, scored
):
    samples = Samples(build_index([str(path) for path in make_shards([6])], tmp_path / "index"))
    views = Views(SIDE, lambda captions: torch.tensor([[len(c), 3, 5] for c in captions]), {}, scored=scored)
    model = Means()
    ((batch, image_BD, text_BD, _, cos_B),) = embed(model, samples, views, [(range(6), range(6))], "cpu")
    each = [(model(view, None)[0] * text_BD).sum(1) for view in scored(batch.images)]
    torch.testing.assert_close(scores(batch, image_BD, text_BD, batch.rows), torch.stack(each).mean(0))
    torch.testing.assert_close(cos_B, each[0])
    batch.valid[2] = False
    assert scores(batch, image_BD, text_BD, batch.rows).isnan().tolist() == [row == 2 for row in range(6)]
