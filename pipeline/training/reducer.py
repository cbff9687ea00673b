"""Gradients averaged over the ranks while the backward pass still runs (ZeRO-0).

The method of DistributedDataParallel (Li et al. 2020, arXiv:2006.15704, section 3.2): gradients are copied into buckets
as they are ready, and a full bucket is reduced while those of earlier layers are calculated.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.training.model import ALIGNED, Towers


@dataclass
class Bucket:
    flat: Tensor  # fp32: the gradients, end to end
    place: dict[nn.Parameter, Tensor]  # part of `flat`, in the shape of its parameter
    missing: set[nn.Parameter]  # those whose gradient is not there yet
    work: dist.Work | None = None


class Reducer:
    """After each backward pass for which `wanted()` is true, and `finish`, each gradient is its mean over the ranks.

    parameters: in the order in which a backward pass reaches them, the same on all ranks; one without a gradient counts
    as zeros. fp32 gradients stay in the buckets, so they cost no second copy; others are added in fp32 and copied back.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_numbers: int, wanted: Callable[[], bool]):
        self.wanted, self.buckets = wanted, []
        self.bucket_of: dict[nn.Parameter, Bucket] = {}
        for part in split([p for p in parameters if p.requires_grad], bucket_numbers):
            bucket = make_bucket(part)
            self.buckets.append(bucket)
            for parameter in part:
                self.bucket_of[parameter] = bucket
                parameter.register_post_accumulate_grad_hook(self.ready)

    def ready(self, parameter: nn.Parameter) -> None:
        """Called by torch when the gradient of a parameter is complete."""
        if self.wanted():
            self.take(parameter)
            self.reduce_full()

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Copy a gradient into its bucket."""
        bucket = self.bucket_of[parameter]
        place = bucket.place[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        place.copy_(parameter.grad)
        if parameter.grad.dtype == place.dtype:
            parameter.grad = place
        bucket.missing.discard(parameter)

    def reduce_full(self) -> None:
        """Start to reduce full buckets, in their order, which is that of all ranks."""
        for bucket in self.buckets:
            if bucket.missing:
                return
            if bucket.work is None:
                bucket.flat /= dist.get_world_size()
                bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all gradients are reduced; to be called after each backward pass."""
        if not self.wanted():
            return
        for bucket in self.buckets:
            for parameter in list(bucket.missing):
                self.take(parameter)
        self.reduce_full()
        for bucket in self.buckets:
            bucket.work.wait()  # type: ignore[union-attr]  # reduce_full has set it
            bucket.work, bucket.missing = None, set(bucket.place)
            for parameter, place in bucket.place.items():
                if parameter.grad is not place:
                    parameter.grad.copy_(place)  # type: ignore[union-attr]  # take has set it


def backward_order(towers: Towers) -> list[nn.Parameter]:
    """Parameters as a backward pass reaches them: the text tower, which ran last, before the picture's, the last blocks
    first. open_clip registers the table of token embeddings behind the blocks that read it."""
    visual = set(towers.clip.visual.parameters())
    tables = {m.weight for m in towers.modules() if isinstance(m, nn.Embedding)}
    return sorted(list(towers.parameters())[::-1], key=lambda p: (p in visual, p in tables))


def split(parameters: list[nn.Parameter], numbers: int) -> list[list[nn.Parameter]]:
    """The parameters in parts; each but the last ends with the parameter that brings it to so many numbers."""
    parts: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if room <= 0:
            parts.append([])
            room = numbers
        parts[-1].append(parameter)
        room -= parameter.numel()
    return parts


def make_bucket(parameters: list[nn.Parameter]) -> Bucket:
    """Bucket of the parameters, each of whose gradients starts where GPU kernels read several numbers at once."""
    starts = [0]
    for parameter in parameters:
        starts.append(starts[-1] + -(-parameter.numel() // ALIGNED) * ALIGNED)
    flat = torch.zeros(starts[-1], device=parameters[0].device)
    # The strides of the parameter: a fused optimizer reads weight and gradient in the order of memory.
    place = {p: flat.as_strided(p.shape, p.stride(), start) for p, start in zip(parameters, starts)}
    return Bucket(flat, place, set(parameters))
