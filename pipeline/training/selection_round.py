"""The selection round before an epoch of a run: score all pairs, apply the guards, select the safe set, save the round.

A round that is on disk already is loaded.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.guards import make_guards
from pipeline.guards.excluded import Excluded, are_saved, guards_folder, load_excluded, score_and_exclude
from pipeline.safety.diagnosis import out_of_range
from pipeline.safety.negative_controls import score_controls
from pipeline.safety.round import load_round, mask_folder, save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles, prune_scores
from pipeline.safety.scoring import Reading, score_all_pairs
from pipeline.training.bad_samples import record, stop_where_bad
from pipeline.training.curriculum import Epoch
from pipeline.training.meter import Meter
from pipeline.training.signals import Agreement, StopSignal
from pipeline.training.start import Run
from shards.errors import UserError
from shards.order.safe_mask import SafeMask

logger = logging.getLogger(__name__)


def mask_for(run: Run, epoch: Epoch, stop: StopSignal) -> SafeMask | None:
    """SafeMask that `epoch` trains with; None if it trains on all pairs. Makes the selection round if one is due."""
    if epoch.mask_of is None:
        return run.mask
    folder, index, state, config = mask_folder(run.run_dir, epoch.mask_of), run.index, run.state, run.config
    meter, due = Meter(0), epoch.round is not None and state["epoch_step"] == 0
    if not comm.on_rank0(is_saved, folder, due, state, config):
        before = mask_folder(run.run_dir, epoch.before) if epoch.round else None
        if before:
            comm.on_rank0(is_saved, before, False, state, config)
        files = score_files(run, epoch, folder)
        score_N, control_C, excluded = scores_for(run, epoch, files, stop, meter)
        if excluded:
            excluded.apply(score_N)
        files.conclude(*([excluded.of_shard] if excluded else []))
        selected = select_pairs(
            score_N,
            index.counts,
            config.selection,
            epoch.round,
            state["first_fraction"],
            before,
            control_C,
            excluded.count if excluded else 0,
        )
        if config.guards and (warning := out_of_range(index.samples)):
            selected.note = f"{selected.note}; {warning}" if selected.note else warning
        made = {"epoch": epoch.number, "step": state["step"], "config": config.hash(), "score": "cosine"}
        comm.on_rank0(save_round, folder, selected, index, made)
        comm.on_rank0(prune_scores, folder, config.run.keep)
    else:
        selected = load_round(folder, index)
    state["first_fraction"] = selected.first_fraction
    if epoch.round == 0:
        state["first_views"] = float((selected.mask.counts("safe") * index.repetitions).sum() / index.views)
    if due:
        seconds = round(meter.seconds, 2)
        run.logger.log(step=state["step"], epoch=epoch.number, stage="selection", seconds=seconds, **selected.summary())
        level = logging.WARNING if selected.note and comm.is_rank0() else logging.INFO
        logger.log(level, f"  epoch {epoch.number:3d} selection {selected.line()}, {seconds:.1f} s")
    return selected.mask


def score_files(run: Run, epoch: Epoch, folder: Path) -> ScoreFiles:
    """Of the round in `folder`; at the first round with the numbers of the guards."""
    guards = make_guards(run.config.guards) if epoch.round == 0 else []
    numbers = {guard.name: guard.features for guard in guards}
    return ScoreFiles(folder / "scores", run.index, run.state["step"], run.config.hash(), numbers)


def scores_for(
    run: Run, epoch: Epoch, files: ScoreFiles, stop: StopSignal, meter: Meter
) -> tuple[np.ndarray, np.ndarray, Excluded | None]:
    """(score_N, control_C, excluded): scores of all pairs and of the negative controls, and what the guards exclude,
    which is found at the first round and loaded later."""
    config, seed, watch = run.config, run.config.run.seed, partial(each_round, run, epoch, stop, meter)
    views = run.views
    if config.selection.scored_view == "augmented":
        views = replace(views, scored_as=(seed, epoch.number))
    reading = Reading(run.engine, run.samples, views, config.selection.batch_size, run.device, run.readers)
    control_C = score_controls(*reading[:5], config.selection.negative_controls, seed)
    guards, folder = make_guards(config.guards), guards_folder(run.run_dir)
    if guards and epoch.round == 0 and not comm.on_rank0(are_saved, folder, guards, run.index, files.made):
        score_N, bad, run.excluded = score_and_exclude(guards, folder, reading, files, seed, watch)
        logger.info(f"  epoch {epoch.number:3d} guards    excluded by {run.excluded.line()}")
    else:
        score_N, bad = score_all_pairs(*reading, files, watch("scoring"))
        if guards and run.excluded is None:
            run.excluded = load_excluded(folder, guards, run.index.fingerprint)
    stop_where_bad(run, record(run, bad), config.data.max_bad_fraction * run.index.samples)
    return score_N, control_C, run.excluded


def each_round(run: Run, epoch: Epoch, stop: StopSignal, meter: Meter, what: str) -> Callable[[int, int], None]:
    """Callback (done, rounds) for all ranks after every batch of a pass over all pairs: logs progress, handles signals.

    Exiting here saves nothing: the last checkpoint is that of the epoch's start, and score files are on disk.
    """

    agreement = Agreement()

    def report(done: int, rounds: int) -> None:
        run.logger.progress(f"  epoch {epoch.number:3d} {what:9s} {done}/{rounds} batches, {meter.seconds:.0f} s")
        if agreement.due(done):
            asked, lost, slowest = comm.all_reduce_max(stop.received, run.lease.lost, agreement.milliseconds())
            agreement.agreed(slowest)
            if lost:
                comm.on_rank0(run.lease.check)
            if asked:
                run.exit_preempted()

    return report


def is_saved(folder: Path, due: bool, state: dict, config: Config) -> bool:
    """Whether the round in `folder` is complete and of this run. Raises UserError if it is missing and no round is
    due."""
    there = (folder / "mask.json").exists()
    if not due:
        if not there:
            raise UserError(
                f"masks: {folder} is missing, and the run resumes from it; "
                "bring it back, or delete the newest checkpoints to resume from an earlier one"
            )
        return True
    # A mask of another config, or of a run that was started anew, is made again.
    meta = json.loads((folder / "mask.json").read_text()) if there else {}
    return (meta.get("step"), meta.get("config")) == (state["step"], config.hash())
