"""The GPU without a GPU: training steps, scoring and guards on a fake "cuda", whose tensors have no values; on one rank
and as one of 64 of torch's fake process group. Nothing is calculated on the CPU, and copies to it are named here."""

import contextlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.distributed import comm
from pipeline.guards import make_guards
from pipeline.guards.features import (
    FEATURES,
    FILTERS,
    LEVELS,
    SIDE,
    cosines,
    hash_weights,
    octaves,
    random_filters,
    take,
)
from pipeline.guards.trigger_classifier import network_of
from pipeline.safety import scoring
from pipeline.training.copy_ahead import copied_ahead
from pipeline.training.losses import GatherRows
from pipeline.training.model import Towers, build_model, param_groups, picture_size, pixel_stats
from pipeline.training.reducer import Reducer, backward_order
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue
from shards.samples.colour import NUMBERS
from shards.views.batch import Batch
from tests.helpers.models import MODEL

ROOT, ROWS, WIDTH = Path(__file__).parents[3], 4, MODEL["embed_dim"]
# The kinds of towers of open_clip: a vision transformer, and CLIP's own residual network.
MODELS = {"vit": MODEL, "resnet": {**MODEL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}}
VIEWS = {"clip": 1, "crossed": 2, "unimodal": 2, "match": 1, "cleanclip": 2}  # crossed: the CLIP loss over two views
ON_CPU = torch.device("cpu")


def at_work():
    """Name of the innermost function of this repository that is at work, tests apart."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "pipeline") or path.is_relative_to(ROOT / "shards"):
            return frame.f_code.co_name
        frame = frame.f_back


class Watch(TorchDispatchMode):
    """Names of the functions that calculate on the CPU, that copy to it, and that wait for a number of the device."""

    def __init__(self):
        super().__init__()
        self.calculated, self.copied, self.awaited = [], [], []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        if operation is aten._local_scalar_dense.default and args[0].device != ON_CPU:
            self.awaited.append(at_work())
            return True
        if operation is aten._to_copy.default and kwargs.get("device") == ON_CPU:
            self.copied.append(at_work())
            return operation(*args, **kwargs)
        if operation is aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1]):
            self.awaited.append(at_work())  # for the number of the rows; all of them here
            args = args[0], [torch.arange(len(i), device=i.device) for i in args[1]]
        found = operation(*args, **kwargs)
        if any(torch.is_tensor(x) and x.device == ON_CPU for x in tree_leaves(found)):
            self.calculated.append((at_work(), str(operation)))
        return found


@pytest.fixture
def fake():
    for size in (32, 224):
        for kept in (
            random_filters,
            partial(hash_weights, 3 * size**2),
            partial(cosines, size),
            partial(octaves, size),
        ):
            kept()  # from the first call on, so not of a fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture(params=[1, 64])
def ranks(request):
    if request.param > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=request.param)
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


class Engine:
    """What DeepSpeed's engine is to a training step, at ZeRO-0."""

    def __init__(self, towers):
        self.module, self.optimizer = towers, torch.optim.AdamW(param_groups(towers, 0.1), fused=True)
        self.step, self.train, self.eval = self.optimizer.step, towers.train, towers.eval
        self.reducer = Reducer(backward_order(towers), 1000, lambda: True) if comm.world() > 1 else None

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, _loss):
        """Zeros: torch's own backward would ask the driver for the device."""
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
            if self.reducer:
                self.reducer.ready(parameter)
        if self.reducer:
            self.reducer.finish()


def engine_of(model):
    with torch.device("cuda"):
        return Engine(Towers(build_model({"config": MODELS[model]}), *pixel_stats()))


def batch_of(model, views, device="cuda"):
    size, length = picture_size({"config": MODELS[model]}), MODEL["text_cfg"]["context_length"]
    with torch.device(device):
        images = torch.zeros(views * ROWS, 3, size, size, dtype=torch.uint8)
        tokens, valid = torch.zeros(views * ROWS, length, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    return Batch(images, tokens, valid, None, [])


def step(model, kind, batch_on="cuda", queue_on="cuda"):
    """(Watch of one training step, engine, queues, loss)."""
    engine, batch = engine_of(model), batch_of(model, VIEWS[kind], batch_on)
    queues = {name: SupportQueue(300, WIDTH, queue_on) for name in ("image", "text")}
    for queue in queues.values():
        queue.filled = 300
    with Watch() as watch:
        loss, _, _ = train_step(engine, queues, batch, "clip" if kind == "crossed" else kind)
    return watch, engine, queues, loss


@pytest.mark.parametrize("model, kind", [("vit", kind) for kind in VIEWS] + [("resnet", "clip")])
def test_a_training_step_stays_on_the_gpu(ranks, fake, model, kind):
    watch, engine, queues, loss = step(model, kind)
    assert watch.calculated == [] and watch.copied == []
    # Whether the gradient is a number is asked for; how many rows are valid is what a queue grows by.
    assert watch.awaited == ["step"] + ["push"] * {"unimodal": 2, "match": 1}.get(kind, 0)
    state = [value for one in engine.optimizer.state.values() for value in one.values()]
    for tensor in (loss, *engine.module.parameters(), *state, *(queue.queue_PD for queue in queues.values())):
        assert tensor.device.type == "cuda"
    pushed = ROWS * ranks if kind == "unimodal" else 0
    assert queues["image"].head == pushed % 300


class Stream:
    """What a stream of CUDA is to copied_ahead. log: what was asked of it, in order."""

    def __init__(self, log):
        self.log = log

    def record_event(self):
        self.log.append(f"copied {self.log[-1]}")
        return self.log[-1]

    def wait_event(self, event):
        self.log.append(f"wait until {event}")


def test_a_batch_is_copied_before_the_step_ahead_of_it_begins(fake, monkeypatch):
    log, held = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(log))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: held.append(id(tensor)))

    def reading():
        for number in range(3):
            log.append(f"batch {number}")
            batch = batch_of("vit", 1, "cpu")
            batch.colours = torch.zeros(len(batch.images), NUMBERS)
            yield batch

    with Watch() as watch:
        for number, batch in enumerate(copied_ahead(reading(), torch.device("cuda"))):
            log.append(f"step {number}")
            tensors = batch.images, batch.tokens, batch.valid
            assert {x.device.type for x in tensors} == {"cuda"} and held[-3:] == [id(x) for x in tensors]
    assert watch.copied == watch.awaited == []
    assert log == [
        *("batch 0", "copied batch 0", "batch 1", "copied batch 1", "wait until copied batch 0", "step 0"),
        *("batch 2", "copied batch 2", "wait until copied batch 1", "step 1"),
        *("wait until copied batch 2", "step 2"),
    ]


@pytest.mark.parametrize("left_behind", [{"batch_on": "cpu"}, {"queue_on": "cpu"}])
def test_a_tensor_left_on_the_cpu_is_an_error(fake, left_behind):
    with pytest.raises(RuntimeError):
        step("vit", "unimodal", **left_behind)


def test_gradients_of_gathered_rows_stay_on_the_gpu(fake):
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        with Watch() as watch:
            grad_BD = GatherRows.backward(None, torch.zeros(64 * ROWS, WIDTH, device="cuda"))
            rows_ND = comm.all_gather_rows(torch.zeros(2, WIDTH, device="cuda"), [5] * 3 + [2] + [5] * 60)
    finally:
        dist.destroy_process_group()
    assert watch.calculated == [] and watch.copied == [] and watch.awaited == []
    assert grad_BD.shape == (ROWS, WIDTH) and rows_ND.shape == (63 * 5 + 2, WIDTH)
    assert grad_BD.device.type == rows_ND.device.type == "cuda"


@pytest.mark.parametrize("model", MODELS)
def test_scoring_stays_on_the_gpu(fake, monkeypatch, model):
    read = [batch_of(model, 1, "cpu") for _ in range(2)]
    monkeypatch.setattr(scoring, "batches", lambda dataset, workers: read)
    monkeypatch.setattr(scoring, "fetched_ahead", lambda reading, dataset: reading)
    engine = engine_of(model)
    with Watch() as watch:
        found = list(scoring.embed(engine, None, None, [], "cuda"))
    assert watch.calculated == [] and watch.copied == [] and watch.awaited == []
    assert [(cos_B.device.type, cos_B.shape, batch.images.device.type) for batch, cos_B in found] == [
        ("cuda", (ROWS,), "cuda")
    ] * 2


@pytest.mark.parametrize("size", [32, 224])
def test_what_guards_see_of_a_picture_stays_on_the_gpu(fake, size):
    images = torch.zeros(20, 3, size, size, dtype=torch.uint8, device="cuda")
    with Watch() as watch:
        found = {name: taken(images) for name, taken in FEATURES.items()}
    assert watch.calculated == [] and watch.copied == [] and watch.awaited == []
    assert {name: (seen.device.type, seen.shape) for name, seen in found.items()} == {
        "pixels": ("cuda", (20, 3 * SIDE**2)),
        "filters": ("cuda", (20, FILTERS)),
        "differences": ("cuda", (20, 2 * SIDE**2)),
        "spectrum": ("cuda", (20, 3 * len(octaves(size)) ** 2)),
        "colours": ("cuda", (20, 3 * LEVELS + 3)),
        "hash": ("cuda", (20,)),
    }


@pytest.mark.parametrize("name", ["trigger_clusters", "trigger_classifier", "duplicates"])
def test_numbers_of_guards_stay_on_the_gpu(fake, name):
    (guard,) = make_guards({name: {}})
    guard.filters = [
        ("pixels", torch.zeros(3 * SIDE**2, device="cuda"), 0.5),
        ("filters", torch.zeros(FILTERS, device="cuda"), 0.5),
        ("differences", torch.zeros(2 * SIDE**2, device="cuda"), 0.5),
        ("spectrum", torch.zeros(3 * 6**2, device="cuda"), 0.5),
    ]
    guard.threshold = 0.5
    with torch.device("cuda"):
        guard.networks = [network_of(torch.zeros(2, 3 * 6**2 + 3 * LEVELS + 3, dtype=torch.float64))] * 2
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="cuda")
    with Watch() as watch:
        found = guard.numbers(take(images, guard.features))
    assert watch.calculated == [] and watch.copied == [] and watch.awaited == []
    assert (found.device.type, found.shape) == ("cuda", (20,))
