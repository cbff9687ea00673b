"""The curriculum: stages of the epochs, the batches of each, and learning rates. Pure functions.

safeclip (Yang, Gao, Mirzasoleiman 2024): unimodal warm-up, low-rate CLIP epochs on all pairs (or a few steps of plain
CLIP), then epochs that select a safe set and train CLIP on it and unimodally on the rest.
clip: no warm-up and no selection.
roclip (Yang and Mirzasoleiman 2023): in every n-th epoch pictures are matched with the nearest captions of a support
queue.
cleanclip (Bansal et al. 2023): fine-tuning of a trained CLIP on clean pairs, with the CLIP loss and a loss within each
modality.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.config.schema import Config, Train
from shards.errors import UserError
from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask

# Loss of each stage that trains on all pairs, or on those of data.mask.
LOSS = {"unimodal": "unimodal", "low_rate": "clip", "clip": "clip", "match": "match", "cleanclip": "cleanclip"}


@dataclass(frozen=True)
class Epoch:
    """One epoch, or a part of one. `number` counts from 0."""

    number: int
    stage: str  # a key of LOSS, or "safeclip"
    round: int | None  # number of SafeCLIP epochs before it if it begins with a selection round, else None
    mask_of: int | None  # number of the epoch of the latest round, whose mask is used
    before: int | None = None  # number of the epoch of the round before that
    begin: int = 0  # first step, of those of a whole epoch
    end: int | None = None  # step after the last one; None: to the end
    ramp: tuple[int, int] | None = None  # (step of the run, number of steps) of those before the first selection round


@dataclass(frozen=True)
class Step:
    """One step: batch `number` of `plan` over `view`. loss: "clip", "unimodal", "match" or "cleanclip"; pass_number:
    which pass over the view in this epoch, from 0."""

    loss: str
    view: str
    plan: EpochPlan
    number: int
    pass_number: int = 0
    mask: SafeMask | None = None


def curriculum(train: Train, every: int | None, steps_per_epoch: int) -> list[Epoch]:
    """The epochs of a run, of `steps_per_epoch` steps each.

    After the warm-up come steps_before_selection of plain CLIP on all pairs; the epoch in which they end continues as
    the first SafeCLIP epoch. Before every `every`-th SafeCLIP epoch the pairs are selected anew. None: before number 0,
    2, 6, 14, ... of them, so that each mask holds twice as long as the one before, as long as at least as many epochs
    follow as were before.
    """
    if train.method == "roclip":
        stages = ["clip" if (number + 1) % train.match_every else "match" for number in range(train.epochs)]
    elif train.method == "safeclip":
        stages = ["unimodal"] * train.unimodal_epochs + ["low_rate"] * train.low_rate_epochs
    else:
        stages = [train.method] * train.epochs
    epochs = [Epoch(number, stage, None, None) for number, stage in enumerate(stages[: train.epochs])]
    if train.method != "safeclip" or len(epochs) == train.epochs:
        return epochs

    ramp = len(epochs) * steps_per_epoch, steps_before_selection(train, steps_per_epoch)
    whole, begin = divmod(ramp[1], max(1, steps_per_epoch))
    count = train.epochs - len(epochs) - whole
    for end in [None] * whole + [begin] * bool(begin):
        epochs.append(Epoch(len(epochs), "clip", None, None, end=end, ramp=ramp))
    mask_of = before = None
    for past in range(count):
        number, selects = len(epochs), None
        if past % every == 0 if every else (past + 2) & (past + 1) == 0 and past <= count - past:
            selects, mask_of, before = past, number, mask_of
        epochs.append(Epoch(number, "safeclip", selects, mask_of, before, 0 if past else begin))
    return epochs


def steps_before_selection(train: Train, steps_per_epoch: int) -> int:
    """train.steps_before_selection, or where it is null: as many as have rates that add up to those of 16 steps at the
    full rate. At most a quarter of the steps that follow the warm-up epochs."""
    steps, warm = train.steps_before_selection, train.warmup_steps
    if steps is None:
        steps = math.ceil(8 * math.sqrt(warm)) if warm > 16 else 16 + warm
    return min(steps, (train.epochs - train.unimodal_epochs - train.low_rate_epochs) * steps_per_epoch // 4)


def epoch_steps(
    epoch: Epoch, counts_S: np.ndarray, mask: SafeMask | None, config: Config, repetitions_S: np.ndarray | None = None
) -> list[Step]:
    """The steps of an epoch, the same on every rank; on all pairs where there is no mask.

    Every epoch has at most as many steps as one over all pairs, so all methods train on as many pairs. A SafeCLIP epoch
    goes over the risky pairs first (unless selection.risky=skip), then over the safe ones. With selection.refill, and
    in all other stages, the mask's pairs are gone over again, in another order and other views, until the epoch is
    full. counts_S: samples of each shard; repetitions_S: how often each of them is seen (None: once). Raises UserError.
    """
    train, chosen = config.train, config.selection
    total = int((counts_S * (1 if repetitions_S is None else repetitions_S)).sum()) // train.batch_size

    def plan(view: str, pass_number: int = 0) -> EpochPlan:
        counts = counts_S if view == "all" else mask.counts(view)
        return EpochPlan(
            counts,
            seed=config.run.seed,
            epoch=epoch.number,
            view=view,
            batch_size=train.batch_size,
            streams=config.data.streams,
            window=config.data.window,
            pass_number=pass_number,
            repetitions_S=repetitions_S,
        )

    if mask is None:
        whole = plan("all")
        return [Step(LOSS[epoch.stage], "all", whole, number) for number in range(whole.steps)][: epoch.end]

    safe, risky = plan("safe"), plan("risky")
    if not safe.steps:
        raise UserError(
            f"selection: the safe set of epoch {epoch.number} has {int(mask.counts('safe').sum())} pairs, "
            f"less than one batch of {train.batch_size}; "
            "set selection.first_fraction, guards.duplicates=null where pictures repeat, or a smaller train.batch_size"
        )
    full = epoch.stage != "safeclip"
    risky_steps = 0 if full or chosen.risky == "skip" else min(risky.steps, total - safe.steps)
    safe_steps = total - risky_steps if full or chosen.refill else safe.steps
    passes = [safe] + [plan("safe", pass_number) for pass_number in range(1, math.ceil(safe_steps / safe.steps))]
    steps = [Step("unimodal", "risky", risky, number, 0, mask) for number in range(risky_steps)]
    for number in range(safe_steps):
        pass_number, within = divmod(number, safe.steps)
        steps.append(Step(LOSS.get(epoch.stage, "clip"), "safe", passes[pass_number], within, pass_number, mask))
    return steps[epoch.begin :]


def learning_rate(epoch: Epoch, step: int, steps: int, train: Train) -> float:
    """Rate at step `step` (from 0) of a schedule of `steps`: linear warm-up, then a cosine to 0; low-rate epochs at
    train.low_rate_lr.

    The steps before the first selection round take the warm-up's rates up to the middle and back, so that the scores
    are those of a model at rest.
    """
    if epoch.stage == "low_rate":
        return train.low_rate_lr
    if epoch.ramp:
        since, left = step - epoch.ramp[0], sum(epoch.ramp) - step
        return train.lr * min(1.0, min(since + 1, left) / max(1, train.warmup_steps))
    warm = min(1.0, (step + 1) / max(1, train.warmup_steps))
    past = max(0, step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    return train.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


def released_rate(
    epoch: Epoch, number: int, steps_per_epoch: int, first_fraction: float, train: Train, growth: float
) -> float:
    """Rate of step `number` (of those of the epoch with its loss, from 0) of a unimodal or SafeCLIP epoch, by the
    counters of the released code (train.schedule=released).

    Each part of the run has one linear warm-up and one cosine: the warm-up epochs over their steps, and both losses of
    the SafeCLIP epochs over as many steps as the CLIP loss would have without a limit to the safe fraction. The counter
    is (epoch's number from 1) * (mean steps of an epoch) + `number`. So it begins some epochs after the start of the
    cosine, and runs on after its end, where the rate rises again. first_fraction: of the first safe set.
    """
    warmup_epochs, warm = train.unimodal_epochs + train.low_rate_epochs, train.warmup_steps
    epochs, fractions = warmup_epochs, float(warmup_epochs)
    if epoch.stage == "safeclip":
        epochs = train.epochs - warmup_epochs
        fractions = sum(first_fraction + past * growth for past in range(epochs))
    steps = round(fractions * steps_per_epoch)
    counter = (epoch.number + 1) * (steps // epochs) + number
    if counter < warm:
        return train.lr * (counter + 1) / warm
    past = (counter - warm) / (steps - warm) if steps > warm else 0.0
    return train.lr * 0.5 * (1 + math.cos(math.pi * past))
