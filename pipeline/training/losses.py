"""The losses. Legend: B rows of this rank, G rows of all ranks, D embedding.

Each rank computes the terms of its own rows against the gathered columns of all. DeepSpeed averages gradients over the
ranks; the scaling here makes that average the gradient of one rank with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F

from pipeline.distributed import comm


class GatherRows(torch.autograd.Function):
    """(B, D) of each rank -> (G, D) of all, in rank order. Backward sums the gradients that every rank has for a
    row."""

    @staticmethod
    def forward(context: FunctionCtx, local_BD: Tensor) -> Tensor:
        return comm.all_gather_rows(local_BD.detach(), [len(local_BD)] * comm.world())

    @staticmethod
    def backward(context: BackwardCFunction, grad_GD: Tensor) -> Tensor:
        grad_GD = grad_GD.contiguous()
        dist.all_reduce(grad_GD)
        return grad_GD.chunk(comm.world())[comm.rank()]


def clip_loss(
    image1_BD: Tensor, text1_BD: Tensor, image2_BD: Tensor, text2_BD: Tensor, scale: Tensor, valid_B: Tensor
) -> Tensor:
    """CLIP's InfoNCE (Radford et al. 2021) over two views, crossed: mean of InfoNCE(image 1, text 2) and InfoNCE(text
    1, image 2).

    With one view (image 2 is image 1, text 2 is text 1) it is CLIP's symmetric loss.
    """
    return (info_nce(image1_BD, text2_BD, scale, valid_B) + info_nce(text1_BD, image2_BD, scale, valid_B)) / 2


def unimodal_loss(
    image2_BD: Tensor, text2_BD: Tensor, near_image_BD: Tensor, near_text_BD: Tensor, scale: Tensor, valid_B: Tensor
) -> Tensor:
    """Mean over both modalities of InfoNCE(view 2, nearest neighbour of view 1) (NNCLR, Dwibedi et al. 2021), in this
    one direction."""
    return (info_nce(image2_BD, near_image_BD, scale, valid_B) + info_nce(text2_BD, near_text_BD, scale, valid_B)) / 2


def info_nce(row_BD: Tensor, column_BD: Tensor, scale: Tensor, valid_B: Tensor) -> Tensor:
    """0-d: mean over the valid rows of all ranks of the cross-entropy of scale * row . column, the targets on the
    diagonal.

    row, column: unit embeddings; scale: (1,); valid: bool. A row that is not valid is no anchor, no positive and no
    negative. The mean of this value over the ranks is the loss of the whole batch, and so are the gradients.
    """
    rank, world, rows = comm.rank(), comm.world(), len(valid_B)
    column_GD, valid_G = column_BD, valid_B
    if world > 1:
        column_GD = GatherRows.apply(column_BD)
        valid_G = comm.all_gather_rows(valid_B, [rows] * world)
    target_B = torch.arange(rank * rows, (rank + 1) * rows, device=row_BD.device)
    # A finite mask: a row without any valid column must give a number, not NaN.
    logits_BG = scale * row_BD @ column_GD.T + torch.where(valid_G, 0.0, -1e9)
    loss_B = F.cross_entropy(logits_BG, target_B, reduction="none")
    return torch.where(valid_B, loss_B, loss_B.detach() * 0).sum() * world / valid_G.sum().clamp(min=1)
