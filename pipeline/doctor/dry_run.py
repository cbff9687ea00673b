"""What a run would be, told before it starts: plan, schedule, memory, and the time of a step on made-up pairs.

Reads the index and no shard, and writes nothing: run.dir may be that of a run that is going on.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pipeline.config.data import describe, open_index
from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.doctor.footprint import how, human, measure, memory_parts
from pipeline.training.curriculum import LOSS, Epoch, curriculum, learning_rate, released_rate
from pipeline.training.engine import start_engine
from pipeline.training.flops import flops_a_view, peak_flops
from pipeline.training.levers import apply_levers
from pipeline.training.meter import memory_peak
from pipeline.training.precision import with_precision
from pipeline.training.pretrained import make_towers
from pipeline.training.start import make_views, steps_per_epoch
from pipeline.training.step import train_step
from pipeline.training.support_queue import SupportQueue
from shards.views.batch import Batch, Views

Rows = Sequence[tuple[str, ...]]


def dry_run(config: Config) -> Iterator[str]:
    """Yield the text in parts, the last when the steps are timed. All ranks call, and take the steps together. Raises
    UserError where the run would."""
    comm.init(config.run.timeout)
    config = with_precision(config)
    train, model, world = config.train, config.model.model_dump(), comm.world()
    stage = how(config, world)[0]
    index, size = open_index(config.data), measure(config)
    steps = steps_per_epoch(config, index, world)
    epochs = curriculum(train, config.selection.every, steps)
    views, flops = make_views(config), flops_a_view(model)
    memory = memory_parts(config, size, world)
    about = [
        ("data", describe(index)),
        ("model", f"{config.model.name or 'model.config'}, {size['parameters']:,} parameters"),
        ("batch", f"{train.batch_size} pairs, {train.batch_size // world} a rank, world size {world}"),
        ("steps", f"{steps:,} an epoch, {train.epochs * steps:,} in {train.epochs} epochs"),
        ("precision", f"{train.precision}, ZeRO {stage}, on {comm.device().type}"),
        ("memory", f"{human(sum(memory.values()))} a process without activations: " + listed(memory)),
        ("FLOPs", f"{flops:.3g} for a view of a pair, forward and backward" if flops else "not known"),
    ]
    stages = [
        ("stage", "epochs", "steps", "learning rate: first", "highest", "last"),
        *stage_rows(config, epochs, steps),
    ]
    yield f"{table(about)}\n\n{table(stages)}\n"
    seconds = step_seconds(config, views, losses(config, epochs))
    timed = [
        ("loss", "views", "seconds a step", "pairs/s", "FLOPs a step", "MFU"),
        *timed_rows(config, views, seconds, flops),
    ]
    peak = f"largest memory of this process so far: {human(memory_peak())}"
    note = "Steps are timed on random pairs that lie in memory. Selection rounds, evaluation and saving come on top."
    yield f"{table(timed)}\n\n{peak}\n{note}"


def listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {human(amount)}" for name, amount in parts.items() if amount)


def stage_rows(config: Config, epochs: list[Epoch], steps: int) -> Iterator[tuple[str, ...]]:
    """A row for epochs of one stage: epochs, steps at most, and the first, highest and last learning rate."""
    train, done = config.train, 0
    for stage, found in itertools.groupby(epochs, key=lambda epoch: epoch.stage):
        part = list(found)
        count = sum((epoch.end or steps) - epoch.begin for epoch in part)
        begin, end = done, done + count - 1
        # Rates are highest where the warm-up ends, or in the middle of the steps before the first selection round.
        peaks = train.warmup_steps - 1, train.warmup_steps, (begin + end) // 2
        places = [begin, *(min(max(place, begin), end) for place in peaks), end]
        rates = [rate_at(config, part[0], place, steps) for place in places]
        shown = [f"{rate:.3g}" for rate in (rates[0], max(rates), rates[-1])]
        done += count
        if stage == "safeclip" and train.schedule == "released":
            shown = ["", f"{train.lr:.3g}", "by the first safe set"]
        first, last = part[0].number, part[-1].number
        yield stage, f"{first}" if first == last else f"{first} to {last}", f"{count:,}", *shown


def rate_at(config: Config, epoch: Epoch, step: int, steps: int) -> float:
    """Learning rate at step `step` of the run; epoch: any of the stage."""
    train = config.train
    if train.schedule == "released" and epoch.stage == "unimodal":
        number, within = divmod(step, steps)
        return released_rate(replace(epoch, number=number), within, steps, 0.0, train, config.selection.growth)
    return learning_rate(epoch, step, train.epochs * steps, train)


def losses(config: Config, epochs: list[Epoch]) -> list[str]:
    """The losses that the run's steps have."""
    found = [LOSS.get(epoch.stage, "clip") for epoch in epochs]
    if config.selection.risky == "unimodal" and any(epoch.stage == "safeclip" for epoch in epochs):
        found.append("unimodal")
    return list(dict.fromkeys(found))


def step_seconds(config: Config, views: Views, kinds: list[str]) -> dict[str, float]:
    """{loss: seconds} of the second step with it, on random pictures."""
    device, train = comm.device(), config.train
    torch.manual_seed(config.run.seed)
    towers = make_towers(config.model.model_dump())
    apply_levers(towers, config)
    stage = how(config, comm.world())[0]
    engine = start_engine(towers, train.model_copy(update={"zero_stage": stage}), device)
    width = measure(config)["embed_dim"]
    queues = {name: SupportQueue(train.support_queue, width, device) for name in ("image", "text")}
    found = {}
    for kind in kinds:
        batch = made_up(train.batch_size // comm.world(), len(views.of[kind]), views).to(device)
        for _ in range(2):
            started = now()
            train_step(engine, queues, batch, kind, train.accumulate)
            found[kind] = now() - started
    return found


def made_up(rows: int, count: int, views: Views) -> Batch:
    """A batch of random pictures and one caption, in `count` views."""
    images = torch.randint(256, (count * rows, 3, views.size, views.size), dtype=torch.uint8)
    tokens = views.tokenize(["a photo of a cat"]).repeat(count * rows, 1)
    return Batch(images, tokens, torch.ones(rows, dtype=torch.bool), torch.arange(rows), [])


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def timed_rows(config: Config, views: Views, seconds: dict[str, float], flops: int | None) -> Iterator[tuple[str, ...]]:
    pairs, peak = config.train.batch_size, peak_flops(comm.device(), config.train.precision)
    for kind, took in seconds.items():
        count = len(views.of[kind])
        work = (flops or 0) * count * pairs
        mfu = f"{work / took / peak / comm.world():.1%}" if peak and work else "not known"
        yield kind, str(count), f"{took:.3f}", f"{pairs / took:,.0f}", f"{work:.3g}", mfu


def table(rows: Rows) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
