"""Batch statistics over the whole global batch, so that N ranks train what one rank would."""

import torch
import torch.distributed as dist
from torch import nn

from pipeline import comm


def share_batch_norm(module):
    """`module` with every BatchNorm2d sharing its statistics over the ranks: torch's own on GPUs, ours on the CPU (it has none)."""
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise NotImplementedError(f"{type(child).__name__} cannot share its statistics on the CPU; train this model on GPUs or in one process")
        else:
            share_batch_norm(child)
    return module


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all ranks' rows (equal batches on every rank)."""

    def forward(self, x_BCHW):
        if not self.training or comm.world() == 1:
            return super().forward(x_BCHW)
        local_2C = torch.stack([x_BCHW.mean((0, 2, 3)), x_BCHW.square().mean((0, 2, 3))])
        mean_C, square_C = MeanOverRanks.apply(local_2C)
        var_C = (square_C - mean_C.square()).clamp(min=0)
        with torch.no_grad():
            count = x_BCHW.numel() / x_BCHW.shape[1] * comm.world()
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        gain_C = self.weight * torch.rsqrt(var_C + self.eps)
        return x_BCHW * gain_C[:, None, None] + (self.bias - mean_C * gain_C)[:, None, None]


class MeanOverRanks(torch.autograd.Function):
    """The mean of every rank's tensor. Backward: the mean of every rank's gradient."""

    @staticmethod
    def forward(context, x):
        return mean_over_ranks(x)

    @staticmethod
    def backward(context, grad):
        return mean_over_ranks(grad)


def mean_over_ranks(x):
    total = x.clone().contiguous()
    dist.all_reduce(total)
    return total / comm.world()
