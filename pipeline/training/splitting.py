"""The split before an epoch, as a run makes it: score all pairs, split them, keep what the next split goes on from. What is on disk is used as it is."""

import json
from dataclasses import replace

import numpy as np

from pipeline import comm
from pipeline.safety.canaries import score_canaries
from pipeline.safety.copies import singles_of_run
from pipeline.safety.marks import marks_of_run, unmarked_of_run
from pipeline.safety.sample import sample_of_run
from pipeline.safety.scores import ScoreFiles, running_mean
from pipeline.safety.scoring import gather_voters, score_all_pairs, score_some_pairs
from pipeline.safety.split import load_split, mask_folder, save_split, split_pairs
from pipeline.safety.suspicion import Suspicion, learn, raised
from pipeline.training import signals
from pipeline.training.bad import record, stop_where_bad
from pipeline.training.journal import Meter
from shards.errors import UserError

PROBATION = 3  # splits for which every mark is held against its pairs, whatever they score


def mask_for(run, epoch, stop):
    """The mask that `epoch` trains with: where it is due, all pairs are scored and split; what is already on disk is used as it is.

    None where it trains on all pairs."""
    if epoch.mask_of is None:
        return slow_mask(run, epoch) if epoch.stage == "slow" else run.mask
    folder, index, state, config = mask_folder(run.run_dir, epoch.mask_of), run.index, run.state, run.config
    meter, due = Meter(0), epoch.split is not None and state["epoch_step"] == 0
    if not comm.on_main(is_split, folder, due, state, config):
        before = mask_folder(run.run_dir, epoch.mask_of - config.selection.every) if epoch.split else None
        suspicion = comm.on_main(suspicion_of, before, state, config) if before and config.selection.suspicion else None
        score_N, lowered_N, canary_C, mean_of, suspicion = scores_for(
            run, epoch, folder, before, suspicion, stop, meter
        )
        live = run.samples.canaries and run.samples.canaries.rows
        first_share = state["first_share"]
        split = split_pairs(
            score_N, index.counts, config.selection, epoch.split, first_share, before, canary_C, live, lowered_N
        )
        if config.selection.suspicion:
            learn_suspicion(run, folder, score_N, suspicion, epoch.split < PROBATION, canary_C)
        made = {"epoch": epoch.number, "step": state["step"], "config": config.hash()}
        made |= {"score": config.selection.score, "mean_of": mean_of, "suspicion": config.selection.suspicion}
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


def scores_for(run, epoch, folder, before, suspicion, stop, meter):
    """(score_N, lowered_N, canary_C, mean_of, suspicion) of the split in `folder`; the agreement is a mean, which goes on from that in the folder `before`.

    lowered_N: by how much suspicion lowered the scores, None where there is none; mean_of: number of splits that they are the mean of. `suspicion`, what the split before left, lowers the scores; where it left none it
    is learnt first, from the scores of its sample, so that a run's first split holds back what they show."""
    config, index, state = run.config, run.index, run.state
    agreement = config.selection.score == "agreement"
    splits = comm.on_main(splits_so_far, before, state, config) if before and agreement else 0
    before_scores = before / "scores" if splits else None
    files = ScoreFiles(folder / "scores", index, state["step"], config.hash(), before_scores, splits)

    def each_round(done, rounds):
        run.journal.progress(f"  epoch {epoch.number:3d} scoring   {done}/{rounds} batches, {meter.seconds:.0f} s")
        if done % signals.AGREE_EVERY == 0 and any(comm.most(stop.received)):
            run.leave()  # the last checkpoint is that of the epoch's start, and the scored shards are on disk

    seed, voters, views = config.run.seed, None, run.views
    if config.selection.scored_view == "augmented":
        views = replace(views, scored_as=(seed, epoch.number))
    arguments = (run.engine, run.samples, views, config.selection.batch_size, run.device)
    if agreement:
        voters = gather_voters(*arguments, config.selection.voters, seed)
    canary_C = score_canaries(*arguments, config.selection.canaries, seed, voters)
    singles = singles_of(run)
    if config.selection.suspicion and suspicion is None:
        sample = suspicion_sample(run)
        score_S = score_some_pairs(*arguments, comm.broadcast_object(sample and sample.row_S), voters)
        strength = config.selection.suspicion
        suspicion = comm.on_main(first_suspicion, sample, marks_of(run), score_S, strength, canary_C)
    unmarked = None
    if suspicion and any(suspicion.textured_G):
        unmarked = unmarked_of_run(slow_folder(run.run_dir, config.selection), *reading(run), marks_of(run), singles)
    lowered_N = comm.host_array(index.samples, np.float32) if suspicion else None
    score_N, bad = score_all_pairs(
        *arguments, config.data.workers, files, each_round, voters, singles, suspicion, unmarked, lowered_N
    )
    stop_where_bad(run, record(run, bad), config.data.max_bad_fraction * index.samples)
    before_C = np.load(before / "canaries.npy") if splits else ()
    if len(before_C) == len(canary_C):  # their number may have been changed
        canary_C = running_mean(before_C, canary_C, splits)
    return score_N, lowered_N, canary_C, splits + 1, suspicion


def singles_of(run):
    """copies.Singles of the run; None without selection.copies. All ranks call."""
    most = run.config.selection.copies
    return singles_of_run(singles_folder(run.run_dir), *reading(run), most) if most else None


def suspicion_sample(run):
    """sample.Sample of the run, on rank 0 (None elsewhere). All ranks call."""
    return sample_of_run(run.run_dir / "masks" / "sample", *reading(run), run.config.run.seed)


def reading(run):
    """Of what reads every pair once a run: (samples, views, batch size, workers)."""
    return run.samples, run.views, run.config.selection.batch_size, run.config.data.workers


def first_suspicion(sample, marks, score_S, strength, canary_C):
    """Suspicion of a run's first split: every mark, and what the low scores of its sample share."""
    return learn(sample, score_S, strength, marks.in_units(score_S, strength), True, canary_C)


def marks_of(run):
    """Suspicion, marks.find_marks of the run. All ranks call."""
    return marks_of_run(run.run_dir / "masks" / "sample", suspicion_sample(run))


def slow_mask(run, epoch):
    """SafeMask of what the slow epoch trains on: pairs without a mark, whose picture is no copy; None where it trains on all. All ranks call."""
    folder, singles, waiting = slow_folder(run.run_dir, run.config.selection), singles_of(run), []
    if not folder:
        return None
    if singles:
        mask, copies = singles.mask, int(singles.mask.counts("risky").sum())
        waiting.append(f"{copies:,} of pictures in more than {singles.most} pairs")
    if run.config.selection.suspicion:
        marks = marks_of(run)
        mask = unmarked_of_run(folder, *reading(run), marks, singles)
        waiting.append(f"those of {marks.marks} marks")
    risky = int(mask.counts("risky").sum())
    run.journal.say(f"  epoch {epoch.number:3d} slow      {risky:,} pairs wait: {', '.join(waiting)}")
    return mask


def slow_folder(run_dir, selection):
    """Where the mask of the slow epochs is kept; None where they train on all pairs."""
    if selection.suspicion:
        return run_dir / "masks" / "slow"
    return singles_folder(run_dir) if selection.copies else None


def singles_folder(run_dir):
    return run_dir / "masks" / "singles"


def learn_suspicion(run, folder, score_N, suspicion, keep, canary_C):
    """Learn from this split, whose scores `suspicion` has lowered, what the next one suspects (all of it if `keep`); kept in this one's folder.

    All ranks call."""
    sample = suspicion_sample(run)

    def save():
        score_S = raised(sample, score_N[sample.row_S], suspicion)
        learn(sample, score_S, run.config.selection.suspicion, suspicion, keep, canary_C).save(folder)

    comm.on_main(save)


def suspicion_of(before, state, config):
    """Suspicion that the split in the folder `before` left; None where it left none, as selection.suspicion was switched on since.

    Raises UserError if it is gone."""
    is_split(before, False, state, config)
    meta = json.loads((before / "mask.json").read_text())
    return Suspicion.load(before) if meta.get("suspicion") else None


def splits_so_far(before, state, config):
    """Number of splits that the scores in the folder are the mean of; 0 where they are of another kind, as selection.score was changed.

    Raises UserError if the folder is gone."""
    is_split(before, False, state, config)
    meta = json.loads((before / "mask.json").read_text())
    return meta.get("mean_of", 0) if meta["score"] == config.selection.score else 0


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
