"""What a save costs the training: the stall of the step after it, beside a save that is waited for, in one run.

python -m tests.benchmarks.saving [--model RN50] [--zero 1] [--batch 8] [--dir runs/saving]
torchrun --nproc-per-node 2 -m tests.benchmarks.saving         the same with each rank saving its part

Last line: one JSON object. step_s: a step while nothing is written; stall_s: how long `save` keeps the training from
its next step; step_while_writing_s: a step while the files are written; write_s: from the call to the marker; waited_s:
a save that the training waits for.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training.checkpoint import checkpoints
from pipeline.training.engine import start_engine
from pipeline.training.model import Towers, build_model, open_clip_config, picture_size, pixel_stats, tokenizer_for
from pipeline.training.saver import Saver
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue

QUEUE = 65_536


def timed(function, *args):
    """Seconds that function(*args) takes on the slowest rank."""
    comm.barrier()
    started = time.monotonic()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(comm.gather_objects(time.monotonic() - started))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN50")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="pairs a rank")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("runs/saving"))
    args = parser.parse_args()
    comm.init()
    if comm.is_rank0():
        shutil.rmtree(args.dir, ignore_errors=True)
    model, device = {"name": args.model}, comm.device()
    towers = Towers(build_model(model), *pixel_stats())
    engine = start_engine(towers, Train(batch_size=args.batch * comm.world(), zero_stage=args.zero), device)
    width, size = open_clip_config(model)["embed_dim"], picture_size(model)
    queues = {name: SupportQueue(QUEUE, width, device) for name in ("image", "text")}
    saver = Saver(args.dir, engine, queues, None, keep=1)
    batch = SimpleNamespace(
        images=torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8, device=device),
        tokens=tokenizer_for(model)(["a caption"] * args.batch).to(device),
        valid=torch.ones(args.batch, dtype=torch.bool, device=device),
    )

    def step():
        train_step(engine, queues, batch, "clip")

    def save(number):
        saver.save({"step": number, "epoch": 0, "epoch_step": number})

    def save_and_wait(number):
        save(number)
        saver.wait()

    step()  # the first one is slower: buffers, kernels
    steps = [timed(step) for _ in range(5)]
    waited = [timed(save_and_wait, number) for number in range(args.saves)]
    stalls, during, writes = [], [], []
    for number in range(args.saves, 2 * args.saves):
        started = time.monotonic()
        stalls.append(timed(save, number))
        while any(comm.gather_objects(saver.thread.is_alive())):
            during.append(timed(step))
        writes.append(time.monotonic() - started)
        saver.wait()
    if comm.is_rank0():
        (folder,) = checkpoints(args.dir)
        figures = {
            "model": args.model,
            "ranks": comm.world(),
            "zero_stage": args.zero,
            "megabytes": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6),
            "step_s": round(statistics.median(steps), 3),
            "stall_s": round(statistics.median(stalls), 3),
            "step_while_writing_s": round(statistics.median(during), 3) if during else None,
            "write_s": round(statistics.median(writes), 3),
            "waited_s": round(statistics.median(waited), 3),
        }
        shutil.rmtree(args.dir)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
