"""The curriculum: which stage an epoch is, which batches it has, and at what rate it learns. Pure functions.

METHOD (ICML 2024, section 4): unimodal warm-up, slow CLIP epochs, then epochs that split the data and train CLIP on the safe
set and unimodally on the risky. Plain CLIP is the same program with no warm-up and no split.
"""

import math
from dataclasses import dataclass

from shards.errors import UserError
from shards.plan import EpochPlan


@dataclass(frozen=True)
class Epoch:
    """One epoch. `number` counts from 0."""

    number: int
    stage: str  # "unimodal" | "slow" | "clip" | "safeclip"
    split: int | None  # where the data are split before it: how many SafeCLIP epochs were before
    mask_of: int | None  # number of the epoch with the last split: its mask holds


@dataclass(frozen=True)
class Step:
    """One step of an epoch: batch `number` of `plan` over `view`, with `loss` "clip" or "unimodal"."""

    loss: str
    view: str
    plan: EpochPlan
    number: int
    lap: int = 0
    mask: object = None


def curriculum(train, every=1):
    """List of Epoch for a `config.Train`; the data are split before every `every`-th SafeCLIP epoch."""
    epochs, first = [], train.unimodal_epochs + train.slow_epochs
    for number in range(train.epochs):
        if train.method == "clip":
            stage = "clip"
        elif number < train.unimodal_epochs:
            stage = "unimodal"
        elif number < first:
            stage = "slow"
        else:
            stage = "safeclip"
        split = mask_of = None
        if stage == "safeclip":
            since = (number - first) % every
            split, mask_of = None if since else number - first, number - since
        epochs.append(Epoch(number, stage, split, mask_of))
    return epochs


def epoch_steps(epoch, counts_S, mask, config, repeats_S=None):
    """List of Step: the whole epoch, the same on every rank; on all pairs where there is no mask. repeats_S: how often each sample of a shard is seen (None: once).

    Every epoch has at most samples (each as often as it is seen) // batch_size steps, whatever its stage, so all methods train on equal sample views.
    Safe and risky batches are interleaved in proportion to their numbers. With selection.refill, and in slow epochs, the safe set is gone over
    again (another order, other views) until the epoch is full.
    """
    train, chosen = config.train, config.selection
    total = int((counts_S * (1 if repeats_S is None else repeats_S)).sum()) // train.batch_size

    def plan(view, lap=0):
        counts = counts_S if view == "all" else mask.counts(view)
        return EpochPlan(
            counts,
            seed=config.run.seed,
            epoch=epoch.number,
            view=view,
            batch_size=train.batch_size,
            streams=config.data.streams,
            window=config.data.window,
            lap=lap,
            repeats_S=repeats_S,
        )

    if mask is None:
        whole = plan("all")
        loss = "unimodal" if epoch.stage == "unimodal" else "clip"
        return [Step(loss, "all", whole, number) for number in range(whole.steps)]

    safe, risky = plan("safe"), plan("risky")
    if not safe.steps:
        raise UserError(
            f"selection: the safe set of epoch {epoch.number} has {int(mask.counts('safe').sum())} pairs, less than one batch of "
            f"{train.batch_size}; set selection.first_share, selection.copies=null where pictures repeat, or a smaller train.batch_size"
        )
    risky_steps = (
        min(risky.steps, total - safe.steps) if chosen.risky == "unimodal" and epoch.stage == "safeclip" else 0
    )
    safe_steps = total - risky_steps if chosen.refill or epoch.stage == "slow" else safe.steps
    laps = [safe] + [plan("safe", lap) for lap in range(1, math.ceil(safe_steps / safe.steps))]
    steps, used = [], {"safe": 0, "risky": 0}
    for i in range(safe_steps + risky_steps):
        # A safe step wherever the running count of safe steps, in proportion, goes up by one.
        is_safe = (i + 1) * safe_steps // (safe_steps + risky_steps) > i * safe_steps // (safe_steps + risky_steps)
        number = used["safe" if is_safe else "risky"]
        used["safe" if is_safe else "risky"] += 1
        if is_safe:
            lap, within = divmod(number, safe.steps)
            steps.append(Step("clip", "safe", laps[lap], within, lap, mask))
        else:
            steps.append(Step("unimodal", "risky", risky, number, 0, mask))
    return steps


def learning_rate(step, epoch, steps_per_epoch, train):
    """Rate at global step `step` (from 0): linear warm-up, then a cosine to 0 at the run's end; slow epochs at train.slow_lr."""
    if epoch.stage == "slow":
        return train.slow_lr
    total = train.epochs * steps_per_epoch
    warm = min(1.0, (step + 1) / max(1, train.warmup_steps))
    past = max(0, step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return train.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))
