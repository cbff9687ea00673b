"""Batch statistics over the whole global batch, so that N ranks train what one rank would."""

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from pipeline.distributed import comm
from shards.errors import UserError


def share_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm2d sharing its statistics over the ranks: torch's own on GPUs, ours on the CPU (it
    has none). timm converts them, for it keeps the activation that is a part of its BatchNormAct2d."""
    if torch.cuda.is_available():
        return convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"model: its {type(child).__name__} cannot share statistics over processes on the CPU; "
                "train it on GPUs or in one process"
            )
        else:
            share_batch_norm(child)
    return module


def batch_norms(module: nn.Module) -> list[str]:
    """Names of the batch norms in `module` that are trained: those of a frozen tower use their stored statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, kind)]
    return [name for name, child in found if any(p.requires_grad for p in child.parameters())]


def running_statistics(module: nn.Module) -> list[torch.Tensor]:
    """Running means and variances of all batch norms in `module`, which a forward pass in training changes."""
    kind = nn.modules.batchnorm._BatchNorm
    found = [buffer for child in module.modules() if isinstance(child, kind) for buffer in child.buffers()]
    return [buffer for buffer in found if buffer.is_floating_point()]


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all ranks' rows (equal batches on every rank)."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training or comm.world() == 1:
            return super().forward(x_BCHW)
        y_BCHW, mean_C, var_C = Normalise.apply(x_BCHW, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = x_BCHW.numel() / x_BCHW.shape[1] * comm.world()
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return y_BCHW


class Normalise(torch.autograd.Function):
    """(y, mean, biased variance) of batch normalisation over all ranks (Ioffe and Szegedy 2015); mean and variance
    carry no gradient."""

    @staticmethod
    def forward(
        context: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = mean_over_ranks(moments)
        var = (square - mean.square()).clamp(min=0)
        rstd = torch.rsqrt(var + eps)
        gain = weight * rstd
        context.save_for_backward(x, weight, mean, rstd)
        context.mark_non_differentiable(mean, var)
        return torch.addcmul((bias - mean * gain)[:, None, None], x, gain[:, None, None]), mean, var

    @staticmethod
    def backward(
        context: BackwardCFunction, dy: torch.Tensor, _mean: torch.Tensor, _var: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, weight, mean, rstd = context.saved_tensors  # type: ignore[misc]  # torch's stub knows of one tensor only
        count = x.numel() / x.shape[1]
        dy_C = dy.sum((0, 2, 3))
        dweight_C = ((dy * x).sum((0, 2, 3)) - dy_C * mean) * rstd
        along, across = mean_over_ranks(torch.stack([dweight_C, dy_C]) / count)  # what moving the statistics costs
        gain = weight * rstd
        tilt = gain * along * rstd
        dx = torch.addcmul((tilt * mean - gain * across)[:, None, None], x, -tilt[:, None, None])
        dx.addcmul_(dy, gain[:, None, None])
        return dx, dweight_C, dy_C, None


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x / comm.world()
