"""The split before an epoch, as a run makes it: score all pairs, split them, keep what the next split goes on from. What is on disk is used as it is."""

import json
from dataclasses import replace

from pipeline import comm
from pipeline.guards import make_guards
from pipeline.guards.base import Pairs
from pipeline.guards.excluded import excluded_of_run, guards_folder
from pipeline.safety.canaries import score_canaries
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.safety.split import load_split, mask_folder, save_split, split_pairs
from pipeline.training import signals
from pipeline.training.bad import record, stop_where_bad
from pipeline.training.curriculum import safeclip_epochs
from pipeline.training.journal import Meter
from shards.errors import UserError


def mask_for(run, epoch, stop):
    """The mask that `epoch` trains with: where it is due, all pairs are scored and split; what is already on disk is used as it is.

    None where it trains on all pairs."""
    if epoch.mask_of is None:
        return warm_up_mask(run, epoch) if epoch.stage == "slow" else run.mask
    folder, index, state, config = mask_folder(run.run_dir, epoch.mask_of), run.index, run.state, run.config
    meter, due = Meter(0), epoch.split is not None and state["epoch_step"] == 0
    if not comm.on_main(is_split, folder, due, state, config):
        before = mask_folder(run.run_dir, epoch.mask_of - config.selection.every) if epoch.split else None
        if before:
            comm.on_main(is_split, before, False, state, config)
        excluded = excluded_by_guards(run)
        score_N, canary_C = scores_for(run, epoch, folder, excluded, stop, meter)
        split = split_pairs(
            score_N,
            index.counts,
            config.selection,
            epoch.split,
            state["first_share"],
            before,
            canary_C,
            safeclip_epochs(config.train),
            int(excluded.mask.counts("risky").sum()) if excluded else 0,
        )
        made = {"epoch": epoch.number, "step": state["step"], "config": config.hash(), "score": "cosine"}
        comm.on_main(save_split, folder, split, index, made)
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


def scores_for(run, epoch, folder, excluded, stop, meter):
    """(score_N, canary_C) of the split in `folder`."""
    config, state = run.config, run.state
    files = ScoreFiles(folder / "scores", run.index, state["step"], config.hash())

    def each_round(done, rounds):
        run.journal.progress(f"  epoch {epoch.number:3d} scoring   {done}/{rounds} batches, {meter.seconds:.0f} s")
        if done % signals.AGREE_EVERY == 0 and any(comm.most(stop.received)):
            run.leave()  # the last checkpoint is that of the epoch's start, and the scored shards are on disk

    views = run.views
    if config.selection.scored_view == "augmented":
        views = replace(views, scored_as=(config.run.seed, epoch.number))
    arguments = (run.engine, run.samples, views, config.selection.batch_size, run.device)
    canary_C = score_canaries(*arguments, config.selection.canaries, config.run.seed)
    score_N, bad = score_all_pairs(*arguments, config.data.workers, files, each_round, excluded)
    stop_where_bad(run, record(run, bad), config.data.max_bad_fraction * run.index.samples)
    return score_N, canary_C


def excluded_by_guards(run):
    """guards.excluded.Excluded of the run, found when it is first asked for; None without guards. All ranks call."""
    if run.excluded is None and run.config.guards:
        config = run.config
        reading = (run.samples, run.views, config.selection.batch_size, config.data.workers)
        pairs, guards = Pairs(*reading, config.run.seed, run.device), make_guards(config.guards)
        run.excluded = excluded_of_run(guards_folder(run.run_dir), guards, pairs)
    return run.excluded


def warm_up_mask(run, epoch):
    """SafeMask of what a low-rate epoch trains on: what no guard excludes; None where it trains on all pairs. All ranks call."""
    excluded = excluded_by_guards(run)
    if excluded is None:
        return None
    run.journal.say(f"  epoch {epoch.number:3d} guards    excluded by {excluded.line()}")
    return excluded.mask


def is_split(folder, due, state, config):
    """Whether the mask in `folder` is the one to train with. Where none is `due` it must be: raises UserError if it is gone."""
    there = (folder / "mask.json").exists()
    if not due:
        if not there:
            raise UserError(
                f"masks: {folder} is gone, and the run goes on from it; bring it back, or delete the newest checkpoints to go on "
                "from an earlier one"
            )
        return True
    # A mask of another config, or of a run that was started anew, is made again.
    meta = json.loads((folder / "mask.json").read_text()) if there else {}
    return (meta.get("step"), meta.get("config")) == (state["step"], config.hash())
