"""The losses. Legend: B rows of this rank, G rows of all ranks, D embedding.

A model with a logit bias has the sigmoid loss between pictures and captions, any other CLIP's InfoNCE. `scale` is (1,),
the logit scale, or (2,), scale and bias. Within a modality the loss is InfoNCE with the scale alone.

Each rank computes the terms of its own rows against the gathered columns of all. DeepSpeed averages gradients over the
ranks; the scaling here makes that average the gradient of one rank with the whole batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.distributed import comm

LOGITS = 1 << 24  # that are held at a time: 64 MB in float32


class GatherRows(torch.autograd.Function):
    """(B, D) of each rank -> (G, D) of all, in rank order. Backward sums the gradients that every rank has for a
    row."""

    @staticmethod
    def forward(context: FunctionCtx, local_BD: Tensor) -> Tensor:
        return comm.all_gather_rows(local_BD.detach(), [len(local_BD)] * comm.world())

    @staticmethod
    def backward(context: BackwardCFunction, grad_GD: Tensor) -> Tensor:
        grad_BD = grad_GD.new_empty(len(grad_GD) // comm.world(), *grad_GD.shape[1:])
        comm.REDUCE_SCATTER(grad_BD, grad_GD.contiguous())
        return grad_BD


def clip_loss(
    image1_BD: Tensor, text1_BD: Tensor, image2_BD: Tensor, text2_BD: Tensor, scale: Tensor, valid_B: Tensor
) -> Tensor:
    """The loss between pictures and captions over two views, crossed: mean of loss(image 1, text 2) and loss(text 1,
    image 2), each InfoNCE (Radford et al. 2021), or with a logit bias the sigmoid loss.

    With one view (image 2 is image 1, text 2 is text 1) it is CLIP's symmetric loss, or SigLIP's.
    """
    loss = info_nce if len(scale) == 1 else sigmoid_loss
    return (loss(image1_BD, text2_BD, scale, valid_B) + loss(text1_BD, image2_BD, scale, valid_B)) / 2


def unimodal_loss(
    image2_BD: Tensor, text2_BD: Tensor, near_image_BD: Tensor, near_text_BD: Tensor, scale: Tensor, valid_B: Tensor
) -> Tensor:
    """Mean over both modalities of InfoNCE(view 2, nearest neighbour of view 1) (NNCLR, Dwibedi et al. 2021), in this
    one direction."""
    return (info_nce(image2_BD, near_image_BD, scale, valid_B) + info_nce(text2_BD, near_text_BD, scale, valid_B)) / 2


def info_nce(row_BD: Tensor, column_BD: Tensor, scale: Tensor, valid_B: Tensor) -> Tensor:
    """0-d: mean over the valid rows of all ranks of the cross-entropy of scale * row . column, the targets on the
    diagonal. A logit bias is left out, and has gradient 0."""
    return over_batch(softmax_rows, row_BD, column_BD, scale, valid_B)


def sigmoid_loss(row_BD: Tensor, column_BD: Tensor, scale: Tensor, valid_B: Tensor) -> Tensor:
    """0-d: SigLIP's loss (Zhai et al. 2023, equation 1): -log sigmoid(z * (scale * row . column + bias)), z = 1 on the
    diagonal and -1 elsewhere, summed over all valid pairs and divided by the number of valid rows.

    scale: (2,), scale and bias.
    """
    return over_batch(sigmoid_rows, row_BD, column_BD, scale, valid_B)


def softmax_rows(row_BD: Tensor, column_GD: Tensor, scale: Tensor, valid_G: Tensor, target_B: Tensor) -> Tensor:
    """(B,): cross-entropy of each row's logits over the valid columns."""
    # A finite mask: a row without any valid column must give a number, not NaN.
    logits_BG = scale[:1] * row_BD @ column_GD.T + torch.where(valid_G, 0.0, -1e9)
    return F.cross_entropy(logits_BG, target_B, reduction="none")


def sigmoid_rows(row_BD: Tensor, column_GD: Tensor, scale: Tensor, valid_G: Tensor, target_B: Tensor) -> Tensor:
    """(B,): of each row the sum of -log sigmoid(z * logit) over the valid columns."""
    logits_BG = scale[0] * row_BD @ column_GD.T + scale[1]
    target_B1 = target_B[:, None]
    # softplus(x) is -log sigmoid(-x): of negatives; softplus(x) - x is -log sigmoid(x): of positives.
    against_B = F.softplus(logits_BG).masked_fill(~valid_G, 0).sum(1)
    return against_B - logits_BG.gather(1, target_B1)[:, 0]


def over_batch(
    of_rows: Callable[..., Tensor], row_BD: Tensor, column_BD: Tensor, scale: Tensor, valid_B: Tensor
) -> Tensor:
    """0-d: mean of of_rows(row_BD, column_GD, scale, valid_G, target_B) over the valid rows of all ranks, the column of
    a row's own pair in target_B.

    row, column: unit embeddings; valid: bool. A row that is not valid is no anchor, no positive and no negative. The
    mean of this value over the ranks is the loss of the whole batch, and so are the gradients.
    """
    rank, world, rows = comm.rank(), comm.world(), len(valid_B)
    column_GD, valid_G = column_BD, valid_B
    if world > 1:
        column_GD = GatherRows.apply(column_BD)
        valid_G = comm.all_gather_rows(valid_B, [rows] * world)
    target_B = torch.arange(rank * rows, (rank + 1) * rows, device=row_BD.device)
    at_once = max(1, LOGITS // len(valid_G))
    if rows <= at_once:
        loss_B = of_rows(row_BD, column_GD, scale, valid_G, target_B)
    else:  # the logits of some rows at a time, computed once more in the backward pass
        parts = zip(row_BD.split(at_once), target_B.split(at_once))
        loss_B = torch.cat(
            [checkpoint(of_rows, row, column_GD, scale, valid_G, target, use_reentrant=False) for row, target in parts]
        )
    return torch.where(valid_B, loss_B, loss_B.detach() * 0).sum() * world / valid_G.sum().clamp(min=1)
