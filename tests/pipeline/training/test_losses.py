"""The losses beside open_clip's (their formulas: test_paper.py); rows that are not valid weigh nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.training.losses import clip_loss, info_nce


def unit(seed, rows=6, dim=5):
    torch.manual_seed(seed)
    return F.normalize(torch.randn(rows, dim), dim=1)


@given(st.integers(0, 99), st.floats(1, 100))
def test_clip_loss_of_one_view_is_open_clips(seed, scale):
    import open_clip

    image, text, scale = unit(seed), unit(seed + 1), torch.tensor([scale])
    wanted = open_clip.ClipLoss()(image, text, scale)
    found = clip_loss(image, text, image, text, scale, torch.ones(6, dtype=torch.bool))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@given(st.integers(0, 99), st.lists(st.booleans(), min_size=6, max_size=6))
def test_an_invalid_row_is_as_if_it_were_not_there(seed, valid):
    a, b, scale, valid = unit(seed), unit(seed + 1), torch.tensor([10.0]), torch.tensor(valid)
    a.requires_grad_()
    loss = info_nce(a, b, scale, valid)
    loss.backward()
    assert torch.isfinite(loss) and (a.grad[~valid] == 0).all()
    if valid.any():
        kept = info_nce(a[valid], b[valid], scale, torch.ones(int(valid.sum()), dtype=torch.bool))
        assert float(loss) == pytest.approx(float(kept), rel=1e-4, abs=1e-6)
    else:
        assert loss == 0
