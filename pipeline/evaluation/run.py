"""eval.json of a run: figures of the evaluators on its model, success of the attacks, and quality of its selection.

Rates are fractions, null where they are not known or there is nothing to measure.

preset, seed, epochs, seconds, sample_views    of the run; sample_views: views of pairs that the losses saw
pairs       {"count", "unreadable", "loss", "retrieval"}: of evaluation.pairs (evaluators/loss.py, retrieval.py);
            unreadable pairs are in no figure; count: the others
clean_top1, clean_top5                         zero-shot accuracy on the test pictures (zero_shot.py), without those
                                               that the attacks of data.overlay are about: targets, and pictures of
                                               class-to-class sources
unreadable                                     number of the test pictures that cannot be read, which no figure counts
retrieval                                      {"image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}}
                                               (retrieval.py), of the test set's captions
linear_probe                                   top-1 accuracy (linear_probe.py), on all test pictures
attacks     {NAME: {
    judged, success, interval, count, base, true_class
                            attack_success.py; the base rates of single_target and class_to_class are of the same
                            pictures as clean_top1
    took                    whether plain CLIP on the same poison reaches 80 %: this run if it is one, else the run
                            --baseline; null of a run that was trained without an attack, as is `rounds`, and its
                            fractions are 0
    unpoisoned, unpoisoned_true_class
                            mean success and true_class of models that never saw poison (--unpoisoned)
    fraction_trained_on     of the attack's pairs, those that the CLIP loss saw after the first selection round
    fraction_in_safe_set    for every round: of the attack's pairs, those in the safe set: 1 - recall
    auroc                   as in rounds
    rounds                  {"recall", "auroc", "fpr_at_full_recall", "fpr_at_99_recall"}: lists over the rounds; but
                            for recall null where the scores were not kept (run.keep; selection_quality.py)
}}
rounds                      the same of all poison, and "epoch" and "false_positives"; null without an attack
safe_fraction, poison_in_safe_set
                            for every round: safe pairs / all pairs; poisoned pairs / safe pairs
poison_trained_on           of all poison, the fraction that the CLIP loss saw after the first selection round; null
                            without an attack
negative_controls           for every round, as in mask.json (pipeline/safety/negative_controls.py)

Figures of other evaluators (evaluators/) stand beside these. A round is a selection round of the run; a run that
trained with the mask of a filter (data.mask) has that one.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from pipeline.config.data import open_index, open_overlay, open_samples
from pipeline.config.load import load_run_config
from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.evaluation.attack_success import TOOK
from pipeline.evaluation.evaluators import Evaluators
from pipeline.evaluation.held_out import Embedded
from pipeline.evaluation.linear_probe import linear_probe, open_labels
from pipeline.evaluation.selection_quality import (
    poison_fractions,
    poison_rows,
    selection_quality,
    selection_rounds,
    trained_on,
)
from pipeline.training import checkpoint
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from pipeline.training.weight_average import weights_of
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.storage.files import read_json, write_json


def evaluate_run(
    run_dir: str | Path, baseline: str | None = None, overrides: Sequence[str] = (), unpoisoned: Sequence[str] = ()
) -> dict:
    """Evaluate the newest complete checkpoint of `run_dir` and write RUN/eval.json; returns it as a dict (see above).

    baseline: directory of an evaluated run of plain CLIP on the same poison; unpoisoned: directories of runs on the
    same data without poison. Raises UserError.
    """
    run_dir = Path(run_dir)
    config, folder, towers = load_run(run_dir, overrides)
    trained = load_run_config(run_dir).data.overlay
    index = open_index(config.data)
    overlay = open_overlay(config.data, index)
    # Plain CLIP is its own baseline.
    plain = plain_attacks(baseline, config, overlay, index) if baseline and not is_undefended(config) else {}
    evaluators = Evaluators(config, index, overlay)
    if not evaluators.chosen:
        raise UserError(
            "evaluation: nothing to evaluate; name held-out pairs with evaluation.pairs=INDEX, "
            "or a folder in the CLIP_benchmark layout with evaluation.test=DIR"
        )
    embedded = evaluators.embedded(towers, make_views(config), comm.device())
    figures = evaluators.figures(embedded)
    attacks = figures.pop("attacks", {})
    state = checkpoint.load_state(folder)
    result = {
        "preset": config.preset,
        "seed": config.run.seed,
        **dict.fromkeys(("clean_top1", "clean_top5", "unreadable", "retrieval", "pairs")),
        **figures,
        "linear_probe": probe(embedded, config, index),
        "epochs": min(state["epoch"], config.train.epochs),  # the first may be of two parts
        "seconds": round(state["seconds"], 1),
        "sample_views": state["sample_views"],
        **selection_figures(run_dir, config, trained, overlay, index, attacks),
    }
    if is_undefended(config):
        plain = attacks
    innocent = [judge_innocent(run, evaluators) for run in unpoisoned]
    compare_attacks(result["attacks"], plain if trained else {}, innocent)
    write_json(run_dir / "eval.json", result)
    return result


def compare_attacks(attacks: dict, plain: dict, innocent: list[dict]) -> None:
    """Add to `attacks` what other runs say of them: `plain`, attacks on a run of plain CLIP, and `innocent`, on runs
    without poison."""
    for name, attack in attacks.items():
        attack["took"] = plain[name]["success"] >= TOOK if name in plain else None
        for key, rate in (("unpoisoned", "success"), ("unpoisoned_true_class", "true_class")):
            attack[key] = float(np.mean([found[name][rate] for found in innocent])) if innocent else None


def probe(embedded: Embedded, config: Config, index: ShardIndex) -> float | None:
    """Accuracy of the linear probe; None without a test set or training labels."""
    labels = open_labels(config, index)
    if not labels or not embedded.data.test:
        return None
    samples = open_samples(config.data, index)
    return linear_probe(embedded.encoder, embedded.image_ND, embedded.data.test, samples, labels, config.run.seed)


def selection_figures(
    run_dir: Path, config: Config, trained: str | None, overlay: Overlay | None, index: ShardIndex, attacks: dict
) -> dict:
    """{"safe_fraction", ..., "attacks"}: what eval.json says of a run's selection, `attacks` completed with it.

    trained: data.overlay as the run was trained; None: without an attack, so that `overlay` only judges it.
    """
    rounds = selection_rounds(run_dir, config, index)
    masks = [round.mask for round in rounds]
    diagnoses = [json.loads((round.folder / "mask.json").read_text()).get("diagnosis", {}) for round in rounds]
    found: dict = {
        "safe_fraction": [mask.fraction for mask in masks],
        "poison_in_safe_set": poison_fractions(masks, overlay, index) if overlay and trained else [],
        "poison_trained_on": None,
        "negative_controls": [diagnosis.get("negative_controls") for diagnosis in diagnoses],
        "rounds": None,
        "attacks": attacks,
    }
    if not overlay:
        return found
    of_run = config.model_copy(update={"data": config.data.model_copy(update={"overlay": trained})})
    trained_N = trained_on(run_dir, of_run, index)

    def fraction_trained(name: str | None = None) -> float | None:
        return None if trained_N is None else float(trained_N[poison_rows(overlay, index, name)].mean())

    by_attack: dict[str, dict] = {}
    if trained:
        found["rounds"], by_attack = selection_quality(rounds, overlay, index)
    found["poison_trained_on"] = fraction_trained()
    for name, attack in attacks.items():
        of_attack = by_attack.get(name)
        attack["fraction_in_safe_set"] = [1 - recall for recall in of_attack["recall"]] if of_attack else []
        attack["auroc"] = of_attack["auroc"] if of_attack else []
        attack["fraction_trained_on"] = fraction_trained(name)
        attack["rounds"] = of_attack
    return found


def is_undefended(config: Config) -> bool:
    """Whether a run is plain CLIP on all pairs."""
    return config.train.method == "clip" and not config.data.mask


def plain_attacks(baseline: str, config: Config, overlay: Overlay | None, index: ShardIndex) -> dict:
    """The attacks of the eval.json of a run of plain CLIP on the same poison as `overlay`. Raises UserError."""
    other = load_run_config(baseline)
    if not is_undefended(other):
        mask = f" with data.mask={other.data.mask}" if other.data.mask else ""
        raise UserError(
            f"--baseline {baseline}: was trained with train.method={other.train.method}{mask}; "
            "name a run of plain CLIP (preset=clip)"
        )
    named = [one and os.path.abspath(one) for one in (other.data.overlay, config.data.overlay)]
    poison = overlay if named[0] == named[1] else open_overlay(other.data, index)
    if overlay and (poison is None or (poison.rows, poison.kinds) != (overlay.rows, overlay.kinds)):
        raise UserError(
            f"--baseline {baseline}: was trained with data.overlay={other.data.overlay}, "
            f"this evaluation's is {config.data.overlay}; name a run on the same poison"
        )
    return read_eval(baseline)["attacks"]


def judge_innocent(run_dir: str, evaluators: Evaluators) -> dict:
    """Attacks on a run without poison, by name. Raises UserError."""
    config, _, towers = load_run(run_dir)
    if config.data.overlay:
        raise UserError(
            f"--unpoisoned {run_dir}: was trained with data.overlay={config.data.overlay}; name a run without"
        )
    embedded = evaluators.embedded(towers, make_views(config), comm.device())
    attacks = evaluators.data.attacks
    return attacks(embedded.encoder, embedded.image_ND, embedded.classes_KD) if attacks else {}


def load_run(run_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Path, Towers]:
    """(config, newest complete checkpoint, towers with its weights on this process's device) of a run directory. Raises
    UserError."""
    run_dir = Path(run_dir)
    config = load_run_config(run_dir, overrides)
    folder, warnings = checkpoint.newest_complete(run_dir)
    if folder is None:
        raise UserError(f"run {run_dir}: no complete checkpoint in it ({'; '.join(warnings) or 'none at all'})")
    model = config.model.model_dump()
    towers = Towers(build_model(model), *pixel_stats(model))
    towers.clip.load_state_dict(load_file(weights_of(folder)))
    return config, folder, towers.to(comm.device()).eval().requires_grad_(False)


def read_eval(run_dir: str | Path) -> dict:
    """The eval.json of a run directory. Raises UserError."""
    try:
        return read_json(Path(run_dir) / "eval.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"run {run_dir}: cannot read eval.json ({error}); run `safeclip evaluate {run_dir}` first"
        ) from None


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
