"""The losses against numbers by hand, open_clip's, and cross-entropy over the valid rows alone in float64: values and
gradients, on one rank and on two."""

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from torch.nn import functional as F

from pipeline.distributed import comm
from pipeline.training import losses
from pipeline.training.losses import clip_loss, info_nce, sigmoid_loss, unimodal_loss
from pipeline.training.step import step_loss
from pipeline.training.support_queue import SupportQueue
from tests.helpers.ranks import run_ranks

ROWS, DIM = 6, 5
VALID = torch.tensor([True, False, True, True, True, False])


def unit(seed, count, kind=torch.float64):
    """`count` (ROWS, DIM) of unit rows."""
    numbers = torch.randn(count, ROWS, DIM, dtype=kind, generator=torch.Generator().manual_seed(seed))
    return [rows.clone().requires_grad_() for rows in F.normalize(numbers, dim=2)]


def cross_entropy(row_BD, column_BD, scale, valid_B):
    """Of the valid rows and columns alone, taken out; row k belongs to column k."""
    logits = torch.einsum("id,jd->ij", row_BD[valid_B], column_BD[valid_B]) * scale
    return F.cross_entropy(logits, torch.arange(len(logits)))


def expected_clip(image1, text1, image2, text2, scale, valid):
    one, two = (image1, text2), (text1, image2)
    return (cross_entropy(*one, scale, valid) + cross_entropy(*two, scale, valid)) / 2


def sigmoid(row_BD, column_BD, scale, valid_B):
    """Zhai et al. 2023, equation 1, of the valid rows and columns alone; t = scale[0], b = scale[1]."""
    logits = scale[0] * torch.einsum("id,jd->ij", row_BD[valid_B], column_BD[valid_B]) + scale[1]
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def expected_siglip(image1, text1, image2, text2, scale, valid):
    return (sigmoid(image1, text2, scale, valid) + sigmoid(text1, image2, scale, valid)) / 2


def expected_unimodal(image2, text2, near_image, near_text, scale, valid):
    one, two = (image2, near_image), (text2, near_text)
    return (cross_entropy(*one, scale, valid) + cross_entropy(*two, scale, valid)) / 2


def test_the_step_of_cleanclip_adds_half_the_losses_within_the_modalities():
    """Bansal et al. 2023, equation 5: view 1 is the plain pair, view 2 an augmented one; lambda 1."""
    image1, image2, text1, text2 = unit(3, 4)
    scale = torch.tensor([7.0], dtype=torch.float64)
    found = step_loss("cleanclip", torch.cat([image1, image2]), torch.cat([text1, text2]), scale, {}, VALID)
    across = (cross_entropy(image1, text1, scale, VALID) + cross_entropy(text1, image1, scale, VALID)) / 2
    within = (cross_entropy(image1, image2, scale, VALID) + cross_entropy(text1, text2, scale, VALID)) / 2
    assert found.item() == pytest.approx((across + within).item(), rel=1e-9)


def test_the_step_of_roclip_matches_pictures_with_captions_of_the_queue():
    """Yang and Mirzasoleiman 2023: the CLIP loss of the pictures and these captions, in place of their own."""
    image, text, stored = unit(4, 3, torch.float32)
    queue = SupportQueue(ROWS, DIM, "cpu")
    queue.push(stored.detach(), torch.ones(ROWS, dtype=torch.bool))
    scale = torch.tensor([7.0])
    found = step_loss("match", image, text, scale, {"text": queue}, VALID)
    near = stored[(image @ stored.T).argmax(1)].detach()
    wanted = (cross_entropy(image, near, scale, VALID) + cross_entropy(near, image, scale, VALID)) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward()
    assert image.grad[VALID].norm() > 0 and text.grad.norm() == 0


def test_info_nce_of_two_orthogonal_rows_by_hand():
    """Logits ((2, 0), (0, 2)): log(1 + exp(-2)). With the columns swapped: log(1 + exp(2))."""
    rows, scale, valid = torch.eye(2), torch.tensor([2.0]), torch.ones(2, dtype=torch.bool)
    assert float(info_nce(rows, rows, scale, valid)) == pytest.approx(0.126928, abs=1e-6)
    assert float(info_nce(rows, rows.flip(0), scale, valid)) == pytest.approx(2.126928, abs=1e-6)


def test_sigmoid_loss_of_two_orthogonal_rows_by_hand():
    """Logits ((1, -1), (-1, 1)): 2 log(1 + exp(-1)). With the columns swapped: log(1 + exp(1)) twice."""
    rows, scale, valid = torch.eye(2), torch.tensor([2.0, -1.0]), torch.ones(2, dtype=torch.bool)
    assert float(sigmoid_loss(rows, rows, scale, valid)) == pytest.approx(2 * 0.313262, abs=1e-6)
    assert float(sigmoid_loss(rows, rows.flip(0), scale, valid)) == pytest.approx(2 * 1.313262, abs=1e-6)


def test_each_loss_takes_the_embeddings_that_belong_together_by_hand():
    same, other, scale, valid = torch.eye(2), torch.eye(2).flip(0), torch.tensor([2.0]), torch.ones(2, dtype=torch.bool)
    low, high, mixed = 0.126928, 2.126928, 1.126928
    for images1, texts1, images2, texts2, wanted in (
        (same, other, other, same, low),  # image 1 with text 2, text 1 with image 2
        (same, same, other, other, high),
        (same, same, same, other, mixed),
    ):
        assert float(clip_loss(images1, texts1, images2, texts2, scale, valid)) == pytest.approx(wanted, abs=1e-6)
    for images2, texts2, near_images, near_texts, wanted in (
        (same, other, same, other, low),  # each modality with its own neighbours
        (same, other, other, same, high),
        (same, same, same, other, mixed),
    ):
        found = unimodal_loss(images2, texts2, near_images, near_texts, scale, valid)
        assert float(found) == pytest.approx(wanted, abs=1e-6)


@given(
    st.integers(0, 99),
    st.integers(0, 4 * ROWS),
    st.sampled_from([(clip_loss, [3.0]), (unimodal_loss, [3.0]), (clip_loss, [3.0, -1.0])]),
)
def test_logits_of_some_rows_at_a_time_are_the_same_loss_and_never_all_held(seed, logits, case):
    loss, scale = case
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    leaves = unit(seed, 4)
    wanted = loss(*leaves, scale, VALID)
    grads = torch.autograd.grad(wanted, [*leaves, scale])
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS", logits)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            found = loss(*leaves, scale, VALID)
        again = torch.autograd.grad(found, [*leaves, scale])
    assert max(sizes) < ROWS * ROWS
    torch.testing.assert_close([found, *again], [wanted, *grads], rtol=1e-10, atol=1e-12)


@given(st.integers(0, 99), st.floats(1, 100))
def test_clip_loss_of_one_view_is_open_clips(seed, scale):
    image, text = (x.detach().float() for x in unit(seed, 2))
    wanted = open_clip.ClipLoss()(image, text, scale)
    found = clip_loss(image, text, image, text, torch.tensor([scale]), torch.ones(ROWS, dtype=torch.bool))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@given(st.integers(0, 99), st.floats(1, 100), st.floats(-20, 5))
def test_clip_loss_with_a_bias_is_open_clips_siglip_loss(seed, scale, bias):
    image, text = (x.detach().float() for x in unit(seed, 2))
    wanted = SigLipLoss()(image, text, scale, bias)
    found = clip_loss(image, text, image, text, torch.tensor([scale, bias]), torch.ones(ROWS, dtype=torch.bool))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)


@given(
    st.integers(0, 99),
    st.floats(1, 100),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(any),
    st.sampled_from([(clip_loss, expected_clip), (unimodal_loss, expected_unimodal), (clip_loss, expected_siglip)]),
)
def test_invalid_rows_are_as_if_they_were_not_there(seed, scale, valid, losses):
    """In value and in every gradient; those of invalid rows are 0, not small."""
    valid, (loss, expected) = torch.tensor(valid), losses
    scale = torch.tensor([scale, -10.0][: 1 + (expected is expected_siglip)], dtype=torch.float64, requires_grad=True)
    leaves = unit(seed, 4)
    found, wanted = loss(*leaves, scale, valid), expected(*leaves, scale, valid)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    one, two = (torch.autograd.grad(value, [*leaves, scale]) for value in (found, wanted))
    for ours, theirs in zip(one, two):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert all((ours[~valid] == 0).all() for ours in one[:4])


def test_gradients_are_finite_differences():
    leaves = unit(0, 4)
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *z: clip_loss(*z, VALID), [*leaves, scale])
    scale = torch.tensor([7.0, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *z: clip_loss(*z, VALID), [*leaves, scale])
    # Within a modality the bias takes part with gradient 0: ZeRO-3 needs one of every parameter.
    assert torch.autograd.grad(unimodal_loss(*leaves, scale, VALID), scale)[0][1] == 0


def test_without_a_valid_row_loss_and_gradient_are_zero():
    leaves, none = unit(0, 4), torch.zeros(ROWS, dtype=torch.bool)
    for scale in ([10.0], [10.0, -10.0]):
        loss = clip_loss(*leaves, torch.tensor(scale), none)
        assert loss.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


CASES = [(clip_loss, expected_clip, [14.3]), (unimodal_loss, expected_unimodal, [14.3])]
CASES += [(clip_loss, expected_siglip, [14.3, -10.0])]
HALVES = [VALID, torch.arange(ROWS) >= ROWS // 2]  # some are valid on each rank; none on rank 0


def on_rank():
    """(mean over the ranks of the loss, gradients by this rank's rows) of each loss and each HALVES."""
    half, results = ROWS // comm.world(), []
    mine = slice(comm.rank() * half, (comm.rank() + 1) * half)
    for loss, _, scale in CASES:
        for valid in HALVES:
            leaves = [rows.detach()[mine].clone().requires_grad_() for rows in unit(3, 4)]
            scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
            value = loss(*leaves, scale, valid[mine])
            *grads, by_scale = torch.autograd.grad(value, [*leaves, scale])
            torch.distributed.all_reduce(by_scale)
            results.append((comm.mean(value), grads, by_scale / comm.world()))
            scale = scale.tolist()
    return results


def test_two_ranks_have_the_loss_and_gradients_of_the_whole_batch():
    """Averaged over the ranks, as DeepSpeed averages gradients: half of what each rank has of its own rows."""
    wanted = []
    for _, expected, scale in CASES:
        for valid in HALVES:
            leaves = [*unit(3, 4), torch.tensor(scale, dtype=torch.float64, requires_grad=True)]
            value = expected(*leaves, valid)
            wanted.append((value.item(), torch.autograd.grad(value, leaves)))
    for rank, results in enumerate(run_ranks(on_rank, 2)):
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        for (value, found, by_scale), (whole, gradients) in zip(results, wanted, strict=True):
            assert value == pytest.approx(whole, rel=1e-6)
            torch.testing.assert_close(by_scale, gradients[-1], rtol=1e-7, atol=1e-9)
            for own, gradient in zip(found, gradients):
                torch.testing.assert_close(own / 2, gradient[mine], rtol=1e-7, atol=1e-9)
