"""Weak scaling by simulation: one rank's step of 8 to 1,024 ranks on torch's fake process group and fake tensors, which
have no values.

python -m tests.benchmarks.weak_scaling [--model ViT-B-32] [--rows 256] [--queue 65536] [--ranks 8 64 256 1024]

The real losses, support queue and backward pass run; the collectives that they ask for are counted, in bytes that a
rank holds after a gather or before a reduction. DeepSpeed's own are not among them: pipeline/training/README.md has
their formulas. Memory: tensors of the step by torch's MemTracker, fp32, without gradients and AdamW's state, which
DeepSpeed holds. Rows that a rank has stay the same, so the whole batch grows with the ranks. Last line: one JSON
object.
"""

import argparse
import json

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.training.model import Towers, build_model, open_clip_config, picture_size, pixel_stats
from pipeline.training.run import train_step
from pipeline.training.support_queue import SupportQueue
from shards.views.batch import Batch

VIEWS = {"clip": 1, "unimodal": 2}


class Collectives(TorchDispatchMode):
    """Counts the bytes of each kind of collective. Every row is taken to be valid, where a step asks for it."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        name = operation.name()
        if name.startswith("c10d::"):
            sizes = [x.numel() * x.element_size() for x in tree_leaves(args) if torch.is_tensor(x)]
            kind = name.removeprefix("c10d::").strip("_")
            self.bytes[kind] = self.bytes.get(kind, 0) + max(sizes)  # the side with all ranks' rows
        if operation is torch.ops.aten.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1]):
            args = args[0], [torch.arange(len(i), device=i.device) for i in args[1]]
        return operation(*args, **(kwargs or {}))


class Engine:
    """What DeepSpeed's engine is to a training step, without its collectives."""

    def __init__(self, towers):
        self.module, self.optimizer = towers, torch.optim.AdamW(towers.parameters(), fused=True)
        self.optimizer.overflow = False  # so that nothing asks for a number

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()

    def get_global_grad_norm(self):
        return 0.0  # DeepSpeed adds up the norms of its parts: one number of each rank


def simulate(model, kind, rows, queue, ranks):
    """{"parameters", "collectives": {kind: bytes}, "memory": {kind: bytes at the peak}} of one rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine = Engine(Towers(build_model(model), *pixel_stats()))
            config, count = open_clip_config(model), VIEWS[kind] * rows
            width, size = config["embed_dim"], picture_size(model)
            images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
            tokens = torch.zeros(count, engine.module.clip.context_length, dtype=torch.int64)
            batch = Batch(images, tokens, torch.ones(rows, dtype=torch.bool), None, [])
            queues = {name: SupportQueue(queue, width, torch.device("cpu")) for name in ("image", "text")}
            for one in queues.values():
                one.filled = queue
            tracker = MemTracker()
            tracker.track_external(engine.module, engine.optimizer, *(one.queue_PD for one in queues.values()))
            with tracker, Collectives() as found:
                train_step(engine, queues, batch, kind)
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
            parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    finally:
        dist.destroy_process_group()
    memory = {str(kind).rpartition(".")[2]: count for kind, count in peak.items()}
    return {"parameters": parameters, "collectives": found.bytes, "memory": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rows", type=int, default=256, help="of a rank")
    parser.add_argument("--queue", type=int, default=65_536)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256, 1024])
    args = parser.parse_args()
    figures = {"model": args.model, "rows": args.rows, "queue": args.queue}
    for kind in VIEWS:
        for ranks in args.ranks:
            found = simulate({"name": args.model}, kind, args.rows, args.queue, ranks)
            print(kind, ranks, found, flush=True)
            figures[f"{kind}_{ranks}"] = found
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
