"""The GPU without a GPU: a step on a fake "cuda", and the collectives of 64 ranks on torch's fake process group."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.distributed import comm
from pipeline.training.losses import clip_loss, unimodal_loss
from pipeline.training.model import Towers, build_model, picture_size, pixel_stats
from pipeline.training.support_queue import SupportQueue


def fake_step(name, kind, device="cuda", images_device="cuda", queue_device="cuda", rows=4):
    """One forward of a named model up to the loss, or to the cosines."""
    model = {"name": name}
    with torch.device(device):
        towers = Towers(build_model(model), *pixel_stats())
    views, size = (1 if kind == "score" else 2), picture_size(model)
    images = torch.zeros(views * rows, 3, size, size, dtype=torch.uint8, device=images_device)
    tokens = torch.zeros(views * rows, 77, dtype=torch.int64, device=device)
    valid = torch.ones(rows, dtype=torch.bool, device=device)
    image_BD, text_BD, scale = towers(images, tokens)
    if kind == "score":
        return (image_BD * text_BD).sum(1).masked_fill(~valid, float("nan"))
    (image1, image2), (text1, text2) = image_BD.chunk(2), text_BD.chunk(2)
    if kind == "clip":
        loss = clip_loss(image1, text1, image2, text2, scale, valid)
    else:
        queues = [SupportQueue(64, image_BD.shape[1], queue_device) for _ in range(2)]
        for queue in queues:
            queue.filled = 64
        loss = unimodal_loss(image2, text2, queues[0].search(image1), queues[1].search(text1), scale, valid)
    return loss  # no backward: torch's autograd asks the driver for the device


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
@pytest.mark.parametrize("kind", ["clip", "unimodal", "score"])
def test_a_whole_step_stays_on_the_gpu(name, kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fake_step(name, kind).device.type == "cuda"


@pytest.mark.parametrize("left_behind", [{"images_device": "cpu"}, {"queue_device": "cpu"}])
def test_a_tensor_left_on_the_cpu_raises(left_behind):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError):
        fake_step("ViT-B-32", "unimodal", **left_behind)


@pytest.fixture
def ranks_64():
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    yield
    dist.destroy_process_group()


def test_the_steps_collectives_at_64_ranks(ranks_64):
    rows, dim = 4, 8
    z = [torch.nn.functional.normalize(torch.randn(rows, dim), dim=1).requires_grad_() for _ in range(4)]
    valid, scale = torch.ones(rows, dtype=torch.bool), torch.ones(1)
    loss = clip_loss(*z, scale, valid) + unimodal_loss(z[0], z[1], z[2].detach(), z[3].detach(), scale, valid)
    loss.backward()
    assert loss.shape == () and all(x.grad.shape == (rows, dim) for x in z)
    queue = SupportQueue(300, dim, "cpu")
    queue.push(z[0], valid)
    assert queue.search(z[0]).shape == (rows, dim)
    assert comm.all_gather_rows(torch.zeros(5), [5] * 64).shape == (320,)
    assert comm.all_gather_rows(torch.zeros(5), [5] * 63 + [2]).shape == (317,)
