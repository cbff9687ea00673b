"""Gradients of 2 ranks, reduced in buckets while the backward pass runs."""

import pytest
import torch
from torch import nn

from pipeline.distributed import comm
from pipeline.training.model import ALIGNED
from pipeline.training.reducer import Reducer, backward_order
from tests.helpers.models import RESNET, VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import global_batch, towers


def network(dtype):
    """A network whose weights have odd sizes, one of them channels last, and one parameter that no pass uses."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3), nn.Linear(3, 1))
    made.to(dtype).to(memory_format=torch.channels_last)
    made.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype)))
    made.register_parameter("frozen", nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False))
    return made


def loss_of(model, part):
    torch.manual_seed(10 * comm.rank() + part)
    return model(torch.randn(4, 3, 4, 4, dtype=model.unused.dtype)).square().sum()


def reduced(numbers, dtype):
    """For two steps of two parts each: (expected, found, buckets of which the reduction began before the first
    layer's gradient was complete, buckets)."""
    model, last, found = network(dtype), [False], []
    reducer = Reducer(model.parameters(), numbers, lambda: last[0])
    begun = []
    model[0].bias.register_post_accumulate_grad_hook(
        lambda _: begun.append([b.work is not None for b in reducer.buckets])
    )
    for step in range(2):
        alone = network(dtype)
        for part in (0, 1):
            loss_of(alone, 2 * step + part).backward()
            last[0] = part == 1
            loss_of(model, 2 * step + part).backward()
            reducer.finish()
        means = {}
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                mean = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                ).float() / comm.world()
                torch.distributed.all_reduce(mean)
                means[name] = mean.to(dtype)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
        found.append((means, grads))
        model.zero_grad()  # sets them to None
    return found, begun, len(reducer.buckets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1, 20, 10_000])
def test_each_gradient_is_its_mean_over_the_ranks(numbers, dtype):
    for steps, begun, buckets in run_ranks(reduced, 2, numbers, dtype):
        for means, grads in steps:
            assert means.keys() == grads.keys() and "unused" in grads and "frozen" not in grads
            for name, mean in means.items():
                assert torch.equal(mean, grads[name]), name
        assert buckets == {1: 9, 20: 4, 10_000: 1}[numbers]
        early = [sum(at) for at in begun]
        assert len(early) == 4 and early[0] == early[2] == 0  # a part that is not the last reduces nothing


def under_way(config):
    """Buckets of one parameter each: (those of the text tower that were not under way when the picture's backward pass
    began, those of the picture's tower that were not when it ended, of how many)."""
    model = towers(config)
    order = backward_order(model)
    visual = [p for p in order if p in set(model.clip.visual.parameters())]
    reducer, at_start, at_end = Reducer(order, 1, lambda: True), [], []
    idle = lambda: [bucket.work is None for bucket in reducer.buckets]  # noqa: E731
    for parameter in visual:
        parameter.register_post_accumulate_grad_hook(lambda _: at_start.append(idle()))
    images, tokens, _ = global_batch("clip", config["vision_cfg"]["image_size"])
    image_BD, text_BD, scale = model(images[0], tokens[0])
    (image_BD @ text_BD.T * scale).square().sum().backward()
    at_end, text = idle(), len(order) - len(visual)
    reducer.finish()
    return sum(at_start[0][:text]), sum(at_end[text:]), text, len(visual)


@pytest.mark.parametrize("config", [VIT, {**VIT, "custom_text": True}, RESNET], ids=["vit", "custom text", "resnet"])
def test_buckets_are_reduced_as_soon_as_their_layers_are_done(config):
    for text_idle, visual_idle, text, visual in run_ranks(under_way, 2, config):
        assert text_idle == 0 and visual_idle == 0 and text > 20 and visual > 20


def test_parts_of_a_bucket_are_aligned_and_hold_nothing_else():
    model = network(torch.float32)
    (bucket,) = Reducer(model.parameters(), 10_000, lambda: True).buckets
    taken = torch.zeros_like(bucket.flat)
    for parameter, place in bucket.place.items():
        assert place.storage_offset() % ALIGNED == 0 and place.shape == parameter.shape
        taken.as_strided(place.shape, place.stride(), place.storage_offset()).add_(1)
    assert taken.max() == 1 and taken.sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
