"""eval.json of a run: its model, and how much poison each of its splits let through."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from pipeline import comm
from pipeline.configfile import load_config
from pipeline.data import open_index, open_overlay
from pipeline.evaluation.evaluators import TOOK, ZeroShot
from pipeline.safety.scores import load_scores
from pipeline.training import checkpoint
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.splitting import slow_folder
from pipeline.training.start import make_views
from shards.errors import UserError
from shards.masks import SafeMask
from shards.storage import write_json


def evaluate_run(run_dir, baseline=None, overrides=(), unpoisoned=()):
    """Evaluate the newest complete checkpoint of `run_dir` and write RUN/eval.json; returns it as a dict.

    `took` (the undefended attack reaches 80 %) is judged by plain CLIP on the same poison: this run
    if it is one, else the run directory `baseline`; without either it is null: unknown. `unpoisoned`: runs on the same data without
    poison; their success is what a trigger does by spoiling pictures, without having been learnt, for they are read as something, and
    their rate of true classes is what the trigger leaves. Models differ in what they read: the mean over the runs is kept.
    Raises UserError.
    """
    run_dir = Path(run_dir)
    config, folder, towers = load_run(run_dir, overrides)
    if not config.evaluation.test:
        raise UserError("evaluation.test: missing; name a folder in the CLIP_benchmark layout with evaluation.test=DIR")
    index = open_index(config.data)
    overlay = open_overlay(config.data, index)
    judge = ZeroShot(config.evaluation, overlay)
    figures = judge(towers, make_views(config), comm.device())
    innocent = [judge_innocent(run, judge) for run in unpoisoned]
    state = checkpoint.load_state(folder)
    undefended = None
    if config.train.method == "clip":
        undefended = figures["attacks"]
    elif baseline:
        undefended = read_eval(baseline)["attacks"]
    folders = [path.parent for path in sorted(run_dir.glob("masks/epoch_*/mask.json"))]
    splits = [(load_scores(folder, index.counts), SafeMask.load(folder, index.fingerprint)[0]) for folder in folders]
    diagnoses = [json.loads((folder / "mask.json").read_text())["diagnosis"] for folder in folders]
    trained_N = trained_on(run_dir, config, index, splits)
    for kind, attack in figures["attacks"].items():
        attack["took"] = undefended[kind]["success"] >= TOOK if undefended else None
        for name, rate in (("unpoisoned", "success"), ("unpoisoned_true_class", "true_class")):
            attack[name] = float(np.mean([found[kind][rate] for found in innocent])) if innocent else None
        attack.update(poison_in_splits(overlay, index, splits, kind))
        attack["share_trained_on"] = share_of_poison(trained_N, overlay, index, kind)
    result = {
        "preset": config.preset,
        "seed": config.run.seed,
        "clean_top1": figures["clean_top1"],
        "epochs": state["epoch"],
        "seconds": round(state["seconds"], 1),
        "sample_views": state["sample_views"],
        "safe_share": [mask.share for _, mask in splits],
        "poison_in_safe_set": poison_shares(overlay, index, splits),
        "poison_trained_on": share_of_poison(trained_N, overlay, index) if overlay else None,
        "canaries": [found.get("canaries") for found in diagnoses],
        "live_canaries": [found.get("live_canaries") for found in diagnoses],
        "attacks": figures["attacks"],
    }
    write_json(run_dir / "eval.json", result)
    return result


def judge_innocent(run_dir, judge):
    """What `judge` finds in a run without poison, by kind of attack. Raises UserError."""
    config, _, towers = load_run(run_dir)
    if config.data.overlay:
        raise UserError(
            f"--unpoisoned {run_dir}: was trained with data.overlay={config.data.overlay}; name a run without"
        )
    return judge(towers, make_views(config), comm.device())["attacks"]


def poison_rows(overlay, index, kind=None):
    """Global rows of the poisoned pairs, of one kind or of all."""
    return np.array(
        [index.offsets[r["shard"]] + r["position"] for r in overlay.rows if kind in (None, r["kind"])], np.int64
    )


def poison_in_splits(overlay, index, splits, kind):
    """Per split: share of the kind's poison that is in the safe set, and AUROC of the score (clean pairs above poison)."""
    poison = poison_rows(overlay, index, kind)
    clean_N = np.ones(index.samples, bool)
    clean_N[poison_rows(overlay, index)] = False
    shares, aurocs = [], []
    truth = np.r_[np.ones(clean_N.sum()), np.zeros(len(poison))]
    for score_N, mask in splits:
        shares.append(float(mask.flags()[poison].mean()))
        # What has no score is never safe: it ranks below all that have one.
        score_N = np.where(np.isnan(score_N), -np.inf, score_N)
        rank_N = np.unique(score_N, return_inverse=True)[1]
        aurocs.append(float(roc_auc_score(truth, np.r_[rank_N[clean_N], rank_N[poison]])))
    return {"share_in_safe_set": shares, "auroc": aurocs}


def trained_on(run_dir, config, index, splits):
    """bool (N,): the pairs that the CLIP loss sees in any epoch; None where that is not known, for a mask is gone."""
    train = config.train
    trained_N = np.full(index.samples, train.method == "clip")
    if train.method != "clip" and train.slow_epochs:
        folder = slow_folder(run_dir, config.selection)
        if folder and not (folder / "mask.json").exists():
            return None
        trained_N |= SafeMask.load(folder, index.fingerprint)[0].flags() if folder else True
    for _, mask in splits:
        trained_N |= mask.flags()
    return trained_N


def share_of_poison(flag_N, overlay, index, kind=None):
    """Share of the poisoned pairs, of one kind or of all, that are flagged; None without flags."""
    return None if flag_N is None else float(flag_N[poison_rows(overlay, index, kind)].mean())


def poison_shares(overlay, index, splits):
    """Per split: poisoned pairs / all pairs of the safe set."""
    if not overlay:
        return []
    poison = poison_rows(overlay, index)
    return [float(mask.flags()[poison].sum() / max(1, mask.flags().sum())) for _, mask in splits]


def load_run(run_dir, overrides=()):
    """(config, newest complete checkpoint, towers with its weights on this process's device) of a run directory."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"run {run_dir}: no config.yaml in it; give a directory that `safeclip train` wrote")
    config = load_config(run_dir / "config.yaml", overrides)
    folder, warnings = checkpoint.newest_complete(run_dir)
    if folder is None:
        raise UserError(f"run {run_dir}: no complete checkpoint in it ({'; '.join(warnings) or 'none at all'})")
    towers = Towers(build_model(asdict(config.model)), *pixel_stats())
    towers.clip.load_state_dict(load_file(folder / "model.safetensors"))
    return config, folder, towers.to(comm.device()).eval().requires_grad_(False)


def read_eval(run_dir):
    """The eval.json of a run directory. Raises UserError."""
    try:
        return json.loads((Path(run_dir) / "eval.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"run {run_dir}: cannot read eval.json ({error}); run `safeclip evaluate {run_dir}` first"
        ) from None


def read_metrics(run_dir):
    """List of the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
