"""Time and memory of a step under each lever of training, beside the plain step. One process, synthetic pairs.

python -m tests.benchmarks.levers                         a small vision transformer at 64 pixels
python -m tests.benchmarks.levers --model ViT-B-32 --batch 256 --precision bf16

Seconds are the processor's on a CPU and the clock's on a GPU, the least of --steps; memory is the most that was held
beyond what is there before the first step. Each lever has a process of its own. Last line: one JSON object.
"""

import argparse
import json
import resource
import time

import torch

from pipeline.config.load import make_config
from pipeline.distributed import comm
from pipeline.training.engine import start_engine
from pipeline.training.levers import apply_levers
from pipeline.training.model import Towers, build_model, open_clip_config, picture_size, pixel_stats
from pipeline.training.step import train_step
from shards.views.batch import Batch
from tests.helpers.ranks import run_ranks

SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 6, "width": 192, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 1000, "width": 128, "heads": 2, "layers": 4},
}
LEVERS = {
    "plain": {},
    "train.accumulate=4": {"train": {"accumulate": 4}},
    "train.checkpoint_activations=true": {"train": {"checkpoint_activations": True}},
    "model.patch_dropout=0.5": {"model": {"patch_dropout": 0.5}},
    "train.compile=true": {"train": {"compile": True}},
}


def measure(lever: dict, model: dict, rows: int, steps: int, precision: str) -> dict[str, float]:
    """{"seconds", "first_seconds", "mb"} of a step of `rows` pairs."""
    torch.manual_seed(0)
    train = {"batch_size": rows, "precision": precision} | lever.get("train", {})
    config = make_config({"preset": "clip", "train": train, "model": model | lever.get("model", {})})
    towers = Towers(build_model(model), *pixel_stats())
    apply_levers(towers, config)
    device = comm.device()
    engine = start_engine(towers, config.train, device)
    engine.train()
    text, size = open_clip_config(model)["text_cfg"], picture_size(model)
    images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8)
    tokens = torch.randint(1, text["vocab_size"], (rows, text["context_length"]))
    batch = Batch(images, tokens, torch.ones(rows, dtype=torch.bool), torch.arange(rows), []).to(device)
    on_gpu = device.type == "cuda"
    clock = time.monotonic if on_gpu else time.process_time
    before, seconds = held(on_gpu), []
    for _ in range(steps + 1):
        start = clock()
        train_step(engine, {}, batch, "clip", config.train.accumulate)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return {"seconds": min(seconds[1:]), "first_seconds": seconds[0], "mb": (held(on_gpu) - before) / 1e6}


def held(on_gpu: bool) -> int:
    """The most bytes that this process held so far."""
    return torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of open_clip; default: a small one")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    model = {"name": args.model} if args.model else {"config": SMALL}
    found = {}
    for name, lever in LEVERS.items():
        (found[name],) = run_ranks(measure, 1, lever, model, args.batch, args.steps, args.precision)
        one, plain = found[name], found["plain"]
        print(
            f"{name:36s} {one['seconds']:7.2f} s a step ({one['seconds'] / plain['seconds']:4.2f} x), "
            f"{one['mb']:7.0f} MB ({one['mb'] / plain['mb']:4.2f} x), first step {one['first_seconds']:.1f} s",
            flush=True,
        )
    print(json.dumps({"batch": args.batch, "precision": args.precision, "model": model, "levers": found}))


if __name__ == "__main__":
    main()
