"""The round before an epoch, as a run makes it: score all pairs, split them, keep what the next round resumes from.
What is on disk is used as it is."""

import json
from dataclasses import replace

from pipeline.distributed import comm
from pipeline.guards import make_guards
from pipeline.guards.base import Pairs
from pipeline.guards.excluded import find_excluded, guards_folder, load_excluded
from pipeline.safety.diagnosis import out_of_range
from pipeline.safety.negative_controls import score_controls
from pipeline.safety.round import load_round, mask_folder, save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.training import signals
from pipeline.training.bad_samples import record, stop_where_bad
from pipeline.training.metrics import Meter
from shards.errors import UserError


def mask_for(run, epoch, stop):
    """The mask that `epoch` trains with: where it is due, all pairs are scored and split; what is already on disk is
    used as it is.

    None where it trains on all pairs."""
    if epoch.mask_of is None:
        return run.mask
    folder, index, state, config = mask_folder(run.run_dir, epoch.mask_of), run.index, run.state, run.config
    meter, due = Meter(0), epoch.round is not None and state["epoch_step"] == 0
    if not comm.on_rank0(round_is_made, folder, due, state, config):
        before = mask_folder(run.run_dir, epoch.before) if epoch.round else None
        if before:
            comm.on_rank0(round_is_made, before, False, state, config)
        score_N, control_C = scores_for(run, epoch, folder, stop, meter)
        excluded = excluded_by_guards(run, epoch, score_N, stop, meter) if config.guards else None
        if excluded:
            excluded.apply(score_N, ScoreFiles(folder / "scores", index, state["step"], config.hash()))
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
        if config.guards and (told := out_of_range(index.samples)):
            selected.note = f"{selected.note}; {told}" if selected.note else told
        made = {"epoch": epoch.number, "step": state["step"], "config": config.hash(), "score": "cosine"}
        comm.on_rank0(save_round, folder, selected, index, made)
    else:
        selected = load_round(folder, index)
    state["first_fraction"] = selected.first_fraction
    if epoch.round == 0:
        state["first_views"] = float((selected.mask.counts("safe") * index.repetitions).sum() / index.views)
    if due:
        seconds = round(meter.seconds, 2)
        run.logger.log(step=state["step"], epoch=epoch.number, stage="selection", seconds=seconds, **selected.summary())
        run.logger.say(f"  epoch {epoch.number:3d} selection {selected.line()}, {seconds:.1f} s")
    return selected.mask


def scores_for(run, epoch, folder, stop, meter):
    """(score_N, control_C) of the round in `folder`."""
    config, state = run.config, run.state
    files = ScoreFiles(folder / "scores", run.index, state["step"], config.hash())
    views = run.views
    if config.selection.scored_view == "augmented":
        views = replace(views, scored_as=(config.run.seed, epoch.number))
    arguments = (run.engine, run.samples, views, config.selection.batch_size, run.device)
    control_C = score_controls(*arguments, config.selection.negative_controls, config.run.seed)
    score_N, bad = score_all_pairs(
        *arguments, config.data.workers, files, each_round(run, epoch, "scoring", stop, meter)
    )
    stop_where_bad(run, record(run, bad), config.data.max_bad_fraction * run.index.samples)
    return score_N, control_C


def each_round(run, epoch, what, stop, meter):
    """A function (done, rounds) for all ranks to call after every batch of a pass over all pairs: progress and signals.

    The last checkpoint is that of the epoch's start, and what is scored is on disk."""

    def told(done, rounds):
        run.logger.progress(f"  epoch {epoch.number:3d} {what:9s} {done}/{rounds} batches, {meter.seconds:.0f} s")
        if done % signals.AGREE_EVERY == 0 and any(comm.all_reduce_max(stop.received)):
            run.exit_preempted()

    return told


def excluded_by_guards(run, epoch, score_N, stop, meter):
    """guards.excluded.Excluded of the run, found at its first selection round and loaded at later ones. All ranks
    call."""
    config, folder, guards = run.config, guards_folder(run.run_dir), make_guards(run.config.guards)
    if epoch.round == 0:
        reading = (run.samples, run.views, config.selection.batch_size, config.data.workers)
        watch = each_round(run, epoch, "guards", stop, meter)
        run.excluded = find_excluded(folder, guards, Pairs(*reading, config.run.seed, run.device, watch), score_N)
        run.logger.say(f"  epoch {epoch.number:3d} guards    excluded by {run.excluded.line()}")
    elif run.excluded is None:
        run.excluded = load_excluded(folder, guards, run.index.fingerprint)
    return run.excluded


def round_is_made(folder, due, state, config):
    """Whether the mask in `folder` is the one to train with. Where none is `due` it must be: raises UserError if it is
    gone."""
    there = (folder / "mask.json").exists()
    if not due:
        if not there:
            raise UserError(
                f"masks: {folder} is gone, and the run resumes from it; "
                "bring it back, or delete the newest checkpoints to resume from an earlier one"
            )
        return True
    # A mask of another config, or of a run that was started anew, is made again.
    meta = json.loads((folder / "mask.json").read_text()) if there else {}
    return (meta.get("step"), meta.get("config")) == (state["step"], config.hash())
