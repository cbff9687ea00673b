"""The losses. Legend: B rows of this rank, G rows of all ranks, D embedding.

Each rank computes the terms of its own rows against the gathered columns of all. DeepSpeed averages gradients over the ranks;
the scaling here makes that average the gradient of one rank with the whole batch (METHOD trap 7).
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from pipeline import comm


class GatherRows(torch.autograd.Function):
    """(B, D) of each rank -> (G, D) of all, in rank order. Backward sums what every rank's loss asks of a row."""

    @staticmethod
    def forward(context, local_BD):
        return comm.all_gather_rows(local_BD.detach(), [len(local_BD)] * comm.world())

    @staticmethod
    def backward(context, grad_GD):
        grad_GD = grad_GD.contiguous()
        dist.all_reduce(grad_GD)
        return grad_GD.chunk(comm.world())[comm.rank()]


def clip_loss(image_BD, text_BD, scale, valid_B):
    """CLIP's symmetric InfoNCE (Radford et al. 2021): each picture against all captions and each caption against all pictures."""
    return info_nce(image_BD, text_BD, scale, valid_B)


def unimodal_loss(image_BD, text_BD, near_image_BD, near_text_BD, scale, valid_B):
    """Mean of both modalities' InfoNCE of view 2 against the nearest neighbours of view 1 (NNCLR, Dwibedi et al. 2021)."""
    return (info_nce(near_image_BD, image_BD, scale, valid_B) + info_nce(near_text_BD, text_BD, scale, valid_B)) / 2


def info_nce(a_BD, b_BD, scale, valid_B):
    """0-d loss, half a -> b and half b -> a, the mean over the valid rows of all ranks.

    a, b: unit embeddings; scale: (1,); valid: bool. A row that is not valid is no anchor, no positive and no negative.
    Averaged over the ranks it is the loss of the whole batch, with its gradient.
    """
    rank, world, rows = comm.rank(), comm.world(), len(valid_B)
    if world > 1:
        a_GD, b_GD = GatherRows.apply(a_BD), GatherRows.apply(b_BD)
        valid_G = comm.all_gather_rows(valid_B, [rows] * world)
    else:
        a_GD, b_GD, valid_G = a_BD, b_BD, valid_B
    target_B = torch.arange(rank * rows, (rank + 1) * rows, device=a_BD.device)
    # A finite mask: a row without any valid column must give a number, not NaN.
    barred_G = torch.where(valid_G, 0.0, -1e9)
    loss = 0.0
    for anchor_BD, other_GD in ((a_BD, b_GD), (b_BD, a_GD)):
        logits_BG = scale * anchor_BD @ other_GD.T + barred_G
        loss_B = F.cross_entropy(logits_BG, target_B, reduction="none")
        loss = loss + torch.where(valid_B, loss_B, loss_B.detach() * 0).sum() / 2
    return loss * world / valid_G.sum().clamp(min=1)
