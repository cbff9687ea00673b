"""The training loop: it reads like the method.

safeclip train configs/quickstart.yaml run.dir=runs/a                               one process, CPU or GPU
torchrun --nproc-per-node 8 -m pipeline.cli train configs/cc3m_rn50.yaml run.dir=runs/a     one node
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from pipeline import comm
from pipeline.safety.scoring import score_all_pairs
from pipeline.safety.split import load_split, save_split, split_pairs
from pipeline.training import checkpoint
from pipeline.training.curriculum import curriculum, epoch_steps, learning_rate
from pipeline.training.engine import clamp_logit_scale, set_lr, start_engine
from pipeline.training.journal import Journal, Meter
from pipeline.training.losses import clip_loss, unimodal_loss
from pipeline.training.model import Towers, build_model, open_clip_config, picture_size, pixel_stats, tokenizer_for
from pipeline.training.neighbors import NeighborPool
from shards.errors import UserError
from shards.index import ShardIndex
from shards.ledger import Ledger
from shards.loader import TrainBatches, Views, batches
from shards.overlay import Overlay
from shards.samples import Samples
from shards.storage import write_bytes

LOG_EVERY = 20  # steps between lines of metrics.jsonl: reading the loss waits for the GPU


def train(config, evaluators=None):
    """Train to the end, from the newest complete checkpoint if there is one. Raises UserError for what the user can mend.

    `evaluators`: name -> function(engine, views, device) -> dict of figures, called by all ranks after an epoch.
    """
    comm.init(config.run.timeout)
    device = comm.device()
    index = ShardIndex.load(config.data.index)
    index.verify()
    overlay = Overlay.load(config.data.overlay, index) if config.data.overlay else None
    samples, views = Samples(index, overlay), make_views(config)
    steps_per_epoch = index.samples // config.train.batch_size
    if not steps_per_epoch:
        raise UserError(
            f"train.batch_size: got {config.train.batch_size}, but {config.data.index} holds only {index.samples} "
            "pairs; take a smaller batch"
        )

    torch.manual_seed(config.run.seed)
    towers = Towers(build_model(asdict(config.model)), *pixel_stats())
    run_dir = prepare(config)  # only now: a start that fails on its input must not claim the directory
    engine = start_engine(towers, config.train, device)
    width = open_clip_config(asdict(config.model))["embed_dim"]
    pools = {name: NeighborPool(config.train.pool, width, device) for name in ("image", "text")}
    state = {"step": 0, "epoch": 0, "seconds": 0.0, "sample_views": 0, "first_share": None, "metrics_bytes": 0}
    found = checkpoint.newest_complete(run_dir)
    if found:
        state = checkpoint.load_checkpoint(found, engine, pools)
    journal = Journal(run_dir, config, state["metrics_bytes"])
    ledger = Ledger(run_dir / "bad_samples.jsonl") if comm.is_main() else None
    journal.say(
        f"{run_dir}: {index.samples:,} pairs in {len(index.shards)} shards, {comm.world()} process(es) on {device.type}, "
        f"{config.train.epochs} epochs of {steps_per_epoch} steps"
        + (f", resumed after epoch {state['epoch']}" if found else "")
    )

    for epoch in curriculum(config.train)[state["epoch"] :]:
        started, mask = time.monotonic(), None
        if epoch.split is not None:
            split = split_epoch(epoch, config, engine, samples, views, state, journal, ledger, run_dir)
            mask, state["first_share"] = split.mask, split.first_share
        steps = epoch_steps(epoch, index.counts, mask, config)
        meter, bad = Meter(len(steps)), []
        reading = batches(
            TrainBatches(
                samples, steps, views, seed=config.run.seed, epoch=epoch.number, rank=comm.rank(), world=comm.world()
            ),
            workers=config.data.workers,
        )
        for step in steps:
            waiting = time.monotonic()
            batch = next(reading).to(device)
            waited = time.monotonic() - waiting
            rate = learning_rate(state["step"], epoch, steps_per_epoch, config.train)
            set_lr(engine, rate)
            loss, scale = train_step(engine, pools, batch, step.loss)
            state["step"] += 1
            state["sample_views"] += config.train.batch_size
            bad += batch.bad
            meter.step(config.train.batch_size, waited)
            if meter.done % LOG_EVERY == 0 or meter.done == len(steps):
                report(
                    journal,
                    state,
                    epoch,
                    step,
                    meter,
                    loss,
                    scale,
                    rate,
                    (config.train.epochs - epoch.number - 1) * steps_per_epoch,
                )
        record(ledger, bad)
        state["epoch"] = epoch.number + 1
        state["seconds"] += time.monotonic() - started
        last = state["epoch"] == config.train.epochs
        if evaluators and (last or config.evaluation.every and state["epoch"] % config.evaluation.every == 0):
            for name, evaluate in evaluators.items():
                figures = evaluate(engine, views, device)
                journal.log(step=state["step"], epoch=epoch.number, stage=epoch.stage, **{name: figures})
                journal.say(f"  epoch {epoch.number:3d} {epoch.stage:9s} {name}: " + summary(figures))
        state["metrics_bytes"] = journal.length()
        checkpoint.save_checkpoint(run_dir, engine, pools, state, config.run.keep)
    journal.say(
        f"{run_dir}: done, {state['step']} steps, {state['sample_views']:,} sample views, {state['seconds']:.0f} s"
    )
    journal.close()
    return state


def train_step(engine, pools, batch, kind):
    """One step on this rank's rows; the gradient is that of the global batch. Returns (loss, logit scale), on the device."""
    image_BD, text_BD, scale = engine(batch.images, batch.tokens)
    if kind == "clip":
        loss = clip_loss(image_BD, text_BD, scale, batch.valid)
    else:
        # Rows are [first views, second views]. The positive of view 2 is the nearest past embedding to view 1.
        (image1_BD, image2_BD), (text1_BD, text2_BD) = image_BD.chunk(2), text_BD.chunk(2)
        near_image_BD, near_text_BD = pools["image"].search(image1_BD), pools["text"].search(text1_BD)
        loss = unimodal_loss(image2_BD, text2_BD, near_image_BD, near_text_BD, scale, batch.valid)
        pools["image"].push(image1_BD, batch.valid)
        pools["text"].push(text1_BD, batch.valid)
    engine.backward(loss)
    engine.step()
    clamp_logit_scale(engine)
    return loss.detach(), scale.detach()


def split_epoch(epoch, config, engine, samples, views, state, journal, ledger, run_dir):
    """The Split before `epoch`: scored, decided, saved. One that is already complete on disk is used as it is."""
    folder, index = run_dir / "masks" / f"epoch_{epoch.number:03d}", samples.index
    if comm.broadcast_object((folder / "mask.json").exists()):
        return load_split(folder, index)
    meter = Meter(0)

    def progress(done, rounds):
        journal.progress(f"  epoch {epoch.number:3d} scoring   {done}/{rounds} batches, {meter.seconds:.0f} s")

    cos_N, bad = score_all_pairs(
        engine, samples, views, config.selection.batch_size, comm.device(), config.data.workers, progress
    )
    record(ledger, bad)
    split = split_pairs(cos_N, index.counts, config.selection, epoch.split, state["first_share"])
    if comm.is_main():
        save_split(folder, split, index, {"epoch": epoch.number, "step": state["step"], "config": config.hash()})
    comm.barrier()
    journal.log(
        step=state["step"], epoch=epoch.number, stage="split", seconds=round(meter.seconds, 2), **split.summary()
    )
    journal.say(
        f"  epoch {epoch.number:3d} split     safe {split.share:.1%}, cosine >= {split.cut:.3f}, {meter.seconds:.1f} s"
        + (f" ({split.note})" if split.note else "")
    )
    return split


def prepare(config):
    """The run directory, checked and created: a directory belongs to one config. Returns its Path."""
    if not config.run.dir:
        raise UserError("run.dir: missing; name the run directory with run.dir=DIR")
    if config.train.batch_size % comm.world():
        raise UserError(
            f"train.batch_size: got {config.train.batch_size}, which {comm.world()} processes do not divide; "
            "take a multiple of their number"
        )
    run_dir = Path(config.run.dir).absolute()
    if comm.is_main():
        path = run_dir / "config.yaml"
        if path.exists():
            there = yaml.safe_load(path.read_text())
            if there.get("hash") != config.hash():
                raise UserError(
                    f"run.dir: {run_dir} holds a run with another config (hash {there.get('hash')}, this one "
                    f"{config.hash()}); use the same config to continue it, or another run.dir"
                )
        else:
            text = yaml.safe_dump({"hash": config.hash(), **asdict(config)}, sort_keys=False)
            write_bytes(path, text.encode())
    comm.barrier()
    return run_dir


def make_views(config):
    """shards.loader.Views for a config."""
    model, data = asdict(config.model), config.data
    return Views(
        picture_size(model),
        tokenizer_for(model),
        data.clip_augment,
        data.unimodal_augment,
        data.unimodal_eda,
        data.clip_eda,
    )


def report(journal, state, epoch, step, meter, loss, scale, rate, steps_after):
    """Metrics and the progress line; stops a run whose loss is no number (the last checkpoint stays whole)."""
    loss, scale = comm.mean(loss), float(scale)
    if not math.isfinite(loss):
        raise RuntimeError(
            f"loss is {loss} at step {state['step']}, epoch {epoch.number} ({epoch.stage}, {step.loss} loss)"
        )
    journal.log(
        step=state["step"],
        epoch=epoch.number,
        stage=epoch.stage,
        loss_kind=step.loss,
        loss=round(loss, 6),
        logit_scale=round(scale, 4),
        lr=rate,
        **meter.figures(),
    )
    journal.progress(
        f"  epoch {epoch.number:3d} {epoch.stage:9s} {meter.done:5d}/{meter.total}  loss {loss:7.4f}  "
        + meter.line(meter.total - meter.done + steps_after)
    )


def record(ledger, bad):
    """Write the bad samples that the ranks met into rank 0's ledger."""
    everyone = comm.gather_objects(bad)
    if ledger:
        for sample in sorted({sample for rank in everyone for sample in rank}):
            ledger.add(*sample)


def summary(figures):
    """The evaluation in one line."""
    return f"clean {figures['clean_top1']:.1%}" + "".join(
        f", {kind} {attack['success']:.1%}" for kind, attack in figures["attacks"].items()
    )
