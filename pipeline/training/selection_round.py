"""The split before an epoch, as a run makes it: score all pairs, split them, keep what the next split goes on from.
What is on disk is used as it is."""

import json
from dataclasses import replace

from pipeline.distributed import comm
from pipeline.guards import make_guards
from pipeline.guards.base import Pairs
from pipeline.guards.excluded import find_excluded, guards_folder, load_excluded
from pipeline.safety.diagnosis import out_of_range
from pipeline.safety.negative_controls import score_canaries
from pipeline.safety.round import load_split, mask_folder, save_split, split_pairs
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
    meter, due = Meter(0), epoch.split is not None and state["epoch_step"] == 0
    if not comm.on_rank0(is_split, folder, due, state, config):
        before = mask_folder(run.run_dir, epoch.before) if epoch.split else None
        if before:
            comm.on_rank0(is_split, before, False, state, config)
        score_N, canary_C = scores_for(run, epoch, folder, stop, meter)
        excluded = excluded_by_guards(run, epoch, score_N, stop, meter) if config.guards else None
        if excluded:
            excluded.apply(score_N, ScoreFiles(folder / "scores", index, state["step"], config.hash()))
        split = split_pairs(
            score_N,
            index.counts,
            config.selection,
            epoch.split,
            state["first_share"],
            before,
            canary_C,
            excluded.count if excluded else 0,
        )
        if config.guards and (told := out_of_range(index.samples)):
            split.note = f"{split.note}; {told}" if split.note else told
        made = {"epoch": epoch.number, "step": state["step"], "config": config.hash(), "score": "cosine"}
        comm.on_rank0(save_split, folder, split, index, made)
    else:
        split = load_split(folder, index)
    state["first_share"] = split.first_share
    if epoch.split == 0:
        state["first_views"] = float((split.mask.counts("safe") * index.repeats).sum() / index.views)
    if due:
        seconds = round(meter.seconds, 2)
        run.journal.log(step=state["step"], epoch=epoch.number, stage="split", seconds=seconds, **split.summary())
        run.journal.say(f"  epoch {epoch.number:3d} split     {split.line()}, {seconds:.1f} s")
    return split.mask


def scores_for(run, epoch, folder, stop, meter):
    """(score_N, canary_C) of the split in `folder`."""
    config, state = run.config, run.state
    files = ScoreFiles(folder / "scores", run.index, state["step"], config.hash())
    views = run.views
    if config.selection.scored_view == "augmented":
        views = replace(views, scored_as=(config.run.seed, epoch.number))
    arguments = (run.engine, run.samples, views, config.selection.batch_size, run.device)
    canary_C = score_canaries(*arguments, config.selection.canaries, config.run.seed)
    score_N, bad = score_all_pairs(
        *arguments, config.data.workers, files, each_round(run, epoch, "scoring", stop, meter)
    )
    stop_where_bad(run, record(run, bad), config.data.max_bad_fraction * run.index.samples)
    return score_N, canary_C


def each_round(run, epoch, what, stop, meter):
    """A function (done, rounds) for all ranks to call after every batch of a pass over all pairs: progress and signals.

    The last checkpoint is that of the epoch's start, and what is scored is on disk."""

    def told(done, rounds):
        run.journal.progress(f"  epoch {epoch.number:3d} {what:9s} {done}/{rounds} batches, {meter.seconds:.0f} s")
        if done % signals.AGREE_EVERY == 0 and any(comm.all_reduce_max(stop.received)):
            run.leave()

    return told


def excluded_by_guards(run, epoch, score_N, stop, meter):
    """guards.excluded.Excluded of the run, found at its first selection round and loaded at later ones. All ranks
    call."""
    config, folder, guards = run.config, guards_folder(run.run_dir), make_guards(run.config.guards)
    if epoch.split == 0:
        reading = (run.samples, run.views, config.selection.batch_size, config.data.workers)
        watch = each_round(run, epoch, "guards", stop, meter)
        run.excluded = find_excluded(folder, guards, Pairs(*reading, config.run.seed, run.device, watch), score_N)
        run.journal.say(f"  epoch {epoch.number:3d} guards    excluded by {run.excluded.line()}")
    elif run.excluded is None:
        run.excluded = load_excluded(folder, guards, run.index.fingerprint)
    return run.excluded


def is_split(folder, due, state, config):
    """Whether the mask in `folder` is the one to train with. Where none is `due` it must be: raises UserError if it is
    gone."""
    there = (folder / "mask.json").exists()
    if not due:
        if not there:
            raise UserError(
                f"masks: {folder} is gone, and the run goes on from it; "
                "bring it back, or delete the newest checkpoints to go on from an earlier one"
            )
        return True
    # A mask of another config, or of a run that was started anew, is made again.
    meta = json.loads((folder / "mask.json").read_text()) if there else {}
    return (meta.get("step"), meta.get("config")) == (state["step"], config.hash())
