"""The training loop.

safeclip train configs/quickstart.yaml run.dir=runs/a                               one process, CPU or GPU
torchrun --nproc-per-node 8 -m pipeline.cli train configs/cc3m_rn50.yaml run.dir=runs/a     one node
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Protocol

import torch

from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.safety.score_files import Unread
from pipeline.training import engine as engines
from pipeline.training.bad_samples import bad_so_far, record, stop_where_bad
from pipeline.training.copy_ahead import copied_ahead
from pipeline.training.curriculum import Epoch, Step, epoch_steps, learning_rate, released_rate
from pipeline.training.garbage import collected_at_fixed_steps
from pipeline.training.meter import Meter
from pipeline.training.profile import Profile
from pipeline.training.selection_round import mask_for
from pipeline.training.signals import Agreement, StopSignal
from pipeline.training.start import Run
from pipeline.training.step import train_step
from shards.errors import RunFailed
from shards.storage.prefetch import fetched_ahead
from shards.views.batch import Views
from shards.views.loader import TrainBatches

logger = logging.getLogger(__name__)

LOG_EVERY = 20  # steps between lines of metrics.jsonl
LAST_SAVE = 60.0  # seconds that a save has to end in after an error; other ranks may be dead


class Evaluator(Protocol):
    """Called by all ranks after an epoch: {NAME: figure}. line: the figures in one line of the log."""

    def __call__(self, towers: torch.nn.Module, views: Views, device: torch.device, /) -> dict: ...

    def line(self, figures: dict, /) -> str: ...


def train(config: Config, evaluators: Mapping[str, Evaluator] | None = None, stop: StopSignal | None = None) -> dict:
    """Train to the end, from the newest complete checkpoint if there is one; returns the run's state.

    evaluators: {name of their figures in metrics.jsonl: evaluator}. stop: an active StopSignal of the caller, else a
    new one. Raises UserError for mistakes in the input, and Preempted after a stop signal, with the state saved.
    """
    with (
        nullcontext(stop) if stop else StopSignal() as stop,
        comm.naming_the_lost(),
        Run(config, lambda: stop.received) as run,
    ):
        state, clock, profile = run.state, SaveClock(), Profile(run.run_dir, bool(config.train.profile))
        if any(comm.all_reduce_max(stop.received)):
            run.exit_preempted()  # asked while it started
        stop_where_bad(run, *bad_so_far(run))
        evaluate(run, clock, evaluators or {})  # an epoch whose evaluation was cut off
        for epoch in run.epochs[state["epoch"] :]:
            mask = mask_for(run, epoch, stop)
            steps = epoch_steps(epoch, run.index.counts, mask, config, run.index.repetitions)
            first = state["epoch_step"]
            meter, bad = Meter(len(steps), first, run.view_seconds), []
            dataset = TrainBatches(
                run.samples,
                steps,
                run.views,
                seed=config.run.seed,
                epoch=epoch.number,
                rank=comm.rank(),
                world=comm.world(),
            )
            reading = copied_ahead(fetched_ahead(run.readers.batches(dataset, first), dataset, first), run.device)
            for step in collected_at_fixed_steps(steps[first:]):
                waiting = time.monotonic()
                batch = next(reading)
                meter.waited += time.monotonic() - waiting
                rate = rate_at(run, epoch, step)
                seed = (config.run.seed << 40) + (state["step"] << 14) + comm.rank()
                torch.manual_seed(seed % 2**64)  # dropout, if any
                engines.set_lr(run.engine, rate)
                loss, scale, finite = train_step(run.engine, run.queues, batch, step.loss, config.train.accumulate)
                if not finite:
                    not_finite(run, epoch, step, loss)
                state["step"] += 1
                if run.average and finite:
                    run.average.update(state["step"])
                state["epoch_step"] += 1
                state["sample_views"] += config.train.batch_size * len(run.views.of[step.loss])
                bad += batch.bad
                meter.step(config.train.batch_size, len(run.views.of[step.loss]))
                profile.step()
                if meter.done % LOG_EVERY == 0 or meter.done == len(steps):
                    report(run, epoch, step, meter, loss, scale, rate)
                if meter.done < len(steps) and save_now(run, clock, bad, stop):
                    bad = save(run, clock, bad, stop)
            state.update(
                epoch=epoch.number + 1, epoch_step=0, to_evaluate=bool(evaluators) and is_evaluated(run, epoch)
            )
            save(run, clock, bad, stop)  # before the evaluation, which may take long, or fail
            evaluate(run, clock, evaluators or {})
        run.saver.wait()
        views, seconds = state["sample_views"], state["seconds"]
        logger.info(f"{run.run_dir}: done, {state['step']} steps, {views:,} sample views, {seconds:.0f} s")
    return state


def rate_at(run: Run, epoch: Epoch, step: Step) -> float:
    """Learning rate of a step, by train.schedule."""
    train, state, steps = run.config.train, run.state, run.steps_per_epoch
    if train.schedule == "released" and epoch.stage in ("unimodal", "safeclip"):
        number = step.pass_number * step.plan.steps + step.number
        return released_rate(epoch, number, steps, state["first_views"], train, run.config.selection.growth)
    return learning_rate(epoch, state["step"], train.epochs * steps, train)


class SaveClock:
    """Time of the last save, and time up to which the run's seconds are counted. agreement: of steps."""

    def __init__(self) -> None:
        self.saved = self.counted = time.monotonic()
        self.agreement = Agreement()

    def count(self) -> float:
        """Seconds since this was called last."""
        before, self.counted = self.counted, time.monotonic()
        return self.counted - before


def save_now(run: Run, clock: SaveClock, bad: list[Unread], stop: StopSignal) -> bool:
    """Whether to save after this step: by run.save_steps, by run.save_minutes on rank 0, or because the run stops."""
    settings, step = run.config.run, run.state["step"]
    due = bool(settings.save_steps) and step % settings.save_steps == 0
    if clock.agreement.due(step):
        minutes = (time.monotonic() - clock.saved) / 60
        here = comm.is_rank0() and 0 < settings.save_minutes <= minutes
        asked, late, failed, lost, slowest = comm.all_reduce_max(
            stop.received, here, run.saver.error is not None, run.lease.lost, clock.agreement.milliseconds()
        )
        clock.agreement.agreed(slowest)
        if failed:
            run.saver.wait()  # raises on every rank
        bad_rows, limit = bad_so_far(run, len(bad))
        due = bool(due or asked or late or lost or bad_rows > limit)
    return due


def save(run: Run, clock: SaveClock, bad: list[Unread], stop: StopSignal) -> list[Unread]:
    """Record bad samples, save the state, and exit if a rank was signalled; returns an empty list of bad samples.

    bad: (shard, position, key, reason) of this rank's bad samples since the last call. All ranks call. Raises UserError
    when too many samples are bad or another run has taken over the run directory, Preempted when a rank was signalled.
    """
    comm.on_rank0(run.lease.check)
    run.state["bad_rows"] += record(run, bad)
    run.state.update(seconds=run.state["seconds"] + clock.count(), metrics_bytes=run.logger.length())
    clock.saved = clock.counted
    run.saver.save(run.state)
    if any(comm.all_reduce_max(stop.received)):
        run.exit_preempted()
    stop_where_bad(run, *bad_so_far(run))
    return []


def not_finite(run: Run, epoch: Epoch, step: Step, loss: torch.Tensor) -> None:
    """Handle a skipped step with an infinite or NaN gradient: stop the run, or count it (train.on_nan)."""
    shards = sorted(set(step.plan.batch(step.number, 0, 1)[0].tolist()))
    paths = ", ".join(run.index.shards[shard].path for shard in shards[:4]) + (" ..." if len(shards) > 4 else "")
    text = (
        f"step {run.state['step']}, epoch {epoch.number} ({epoch.stage}, {step.loss} loss): "
        f"the loss is {comm.mean(loss):.4g} and its gradient is infinite or no number; the batch's shards: {paths}"
    )
    if run.config.train.on_nan == "stop":
        run.saver.wait()
        raise RunFailed(
            f"{text}; the step was not taken, the last checkpoint is sound; train.on_nan=skip continues without it"
        )
    run.state["skipped"] += 1
    if comm.is_rank0():
        logger.warning(f"skipped {text} ({run.state['skipped']} so far)")


def is_evaluated(run: Run, epoch: Epoch) -> bool:
    """Whether the config asks for an evaluation after this epoch."""
    done, every = epoch.number + 1, run.config.evaluation.every
    return done == len(run.epochs) or bool(every) and done % every == 0 and epoch.end is None


def evaluate(run: Run, clock: SaveClock, evaluators: Mapping[str, Evaluator]) -> None:
    """Run the evaluators after the last epoch that is done, if that is still to do. All ranks call.

    Its checkpoint is told: a run that resumes from it has the figures, and evaluates only where they are missing.
    """
    state = run.state
    if not state["to_evaluate"]:
        return
    epoch = run.epochs[: state["epoch"]][-1]
    try:
        with run.average.applied() if run.average else nullcontext():
            for name, evaluator in evaluators.items():
                figures = evaluator(run.engine, run.views, run.device)
                run.logger.log(step=state["step"], epoch=epoch.number, stage=epoch.stage, **{name: figures})
                logger.info(f"  epoch {epoch.number:3d} {epoch.stage:9s} {name}: " + evaluator.line(figures))
    except Exception:
        if run.saver.thread:
            run.saver.thread.join(LAST_SAVE)  # which would end with the process
        raise
    state.update(to_evaluate=False, seconds=state["seconds"] + clock.count(), metrics_bytes=run.logger.length())
    run.saver.add(state, ("to_evaluate", "seconds", "metrics_bytes"))


def report(
    run: Run, epoch: Epoch, step: Step, meter: Meter, loss: torch.Tensor, scale: torch.Tensor, rate: float
) -> None:
    """A line of metrics.jsonl and the progress line."""
    mean = comm.mean(loss)
    run.logger.log(
        step=run.state["step"],
        epoch=epoch.number,
        stage=epoch.stage,
        loss_kind=step.loss,
        loss=round(mean, 6),
        logit_scale=round(float(scale[0]), 4),
        **({"logit_bias": round(float(scale[1]), 4)} if len(scale) == 2 else {}),
        gradient_norm=round(float(run.engine.gradient_norm), 6),
        lr=rate,
        skipped=run.state["skipped"],
        **meter.figures(),
    )
    later = sum((one.end or run.steps_per_epoch) - one.begin for one in run.epochs[epoch.number + 1 :])
    run.logger.progress(
        f"  epoch {epoch.number:3d} {epoch.stage:9s} {meter.done:5d}/{meter.total}  loss {mean:7.4f}  "
        + meter.line(meter.total - meter.done + later)
    )
