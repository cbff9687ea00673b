"""The claim of the project, end to end on 10,000 small pairs: a backdoor owns plain CLIP and not preset=default, at the
same clean accuracy and the same number of steps."""

import copy

import pytest

from pipeline.attacks.manifest import make_attack
from pipeline.config.data import open_index, open_overlay
from pipeline.config.load import check, make_config
from pipeline.config.schema import Evaluation
from pipeline.distributed import comm
from pipeline.evaluation.evaluators import Evaluators
from pipeline.evaluation.run import load_run
from pipeline.evaluation.selection_quality import poison_rows
from pipeline.training import run as running
from pipeline.training.start import make_views
from shards.order.safe_mask import SafeMask
from tests.helpers.attacks import attack_config
from tests.helpers.balls import balls
from tests.helpers.models import MODEL
from tests.helpers.ranks import run_ranks

PAIRS, SEED = 10_000, 1
ATTACK = {"badnets": {"attack": "badnets", "pairs": 200, "size": 0.3}}


def config(folder, preset):
    """4 epochs of 78 steps; all else that decides anything is the preset's."""
    made = make_config({"preset": preset})
    made.run.dir, made.run.seed = str(folder / preset), SEED
    made.data.index, made.data.overlay = str(folder / "balls" / "index"), str(folder / "attack")
    made.data.workers, made.data.streams, made.data.window = 0, 8, 2048
    made.data.clip_augment = type(made.data.clip_augment)(crop_min=0.8, flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
    made.model.config = copy.deepcopy(MODEL)
    made.model.config["embed_dim"], made.model.config["vision_cfg"]["patch_size"] = 32, 4
    made.model.config["text_cfg"]["width"] = 32  # with 16 it has learnt too little at the first round, with some seeds
    made.train.epochs, made.train.batch_size, made.train.lr, made.train.warmup_steps = 4, 128, 6e-3, 16
    made.train.zero_stage = 0
    check(made)
    return made


def trained(folder):
    """{preset: (figures of the evaluator, steps, [share of all pairs, of poisoned pairs in each safe set])}."""
    results = {}
    for preset in ("clip", "default"):
        made = config(folder, preset)
        state = running.train(made)
        _, _, towers = load_run(made.run.dir)
        index = open_index(made.data)
        overlay = open_overlay(made.data, index)
        made.evaluation = Evaluation(test=str(folder / "balls"))
        figures, masks = Evaluators(made, index, overlay)(towers, make_views(made), comm.device()), []
        for path in sorted((folder / preset).glob("masks/epoch_*")):
            flags = SafeMask.load(path)[0].flags()
            masks.append((float(flags.mean()), float(flags[poison_rows(overlay, index)].mean())))
        results[preset] = figures, state["step"], masks
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defence")
    balls(folder / "balls", PAIRS, test=400)
    make_attack(attack_config(folder / "balls", folder / "attack", ATTACK, {"seed": SEED}))
    (found,) = run_ranks(trained, 1, folder)
    return found


def test_a_backdoor_owns_plain_clip_and_not_the_default_preset(results):
    clip, default = (results[preset][0]["attacks"]["badnets"] for preset in ("clip", "default"))
    assert clip["success"] > 0.7 and clip["base"] < 0.1
    assert default["success"] < 0.1


def test_the_defence_costs_no_clean_accuracy_and_no_steps(results):
    (clip, steps, _), (default, same_steps, _) = results["clip"], results["default"]
    assert clip["clean_top1"] > 0.9 and default["clean_top1"] > 0.9
    assert steps == same_steps == 4 * 78


def test_the_safe_sets_hold_hardly_any_poison_and_most_of_the_rest(results):
    masks = results["default"][2]
    assert masks and all(share > 0.7 and poison < 0.1 for share, poison in masks)
