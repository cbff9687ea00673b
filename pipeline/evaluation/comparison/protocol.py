"""What rules may be chosen on, and what only reports (tests/benchmarks/README.md). Nothing but the tables' marks
depends on it."""

from pipeline.attacks.transform import CHANGES

TOOK = 0.8  # an attack with less success on plain CLIP, on average over seeds, did not take: its column shows nothing
SEEDS = (0, 1, 2)  # what the tables are recorded on
# BadNets at a fixed place, Blended and single-target by design; the guard trigger_clusters was revised after a look at
# the others, and at emoji.
CHOSEN_ATTACKS = ("badnets", "blended", "single_target", "badnets_random", "sig", "colour_filter", "wanet")
CHOSEN_SEEDS = (0, 1, 2)
# The guard's view of the spectrum and trigger_classifier were made with a look at all transformations on seed 3.
CHOSEN_ON = {**dict.fromkeys(CHOSEN_ATTACKS, CHOSEN_SEEDS), **dict.fromkeys(CHANGES, (3,))}
CHOSEN_SETS = ("shapes", "photos", "photos_32_epochs", "emoji")


def may_be_chosen_on(set_name: str, attack: str, seed: int) -> bool:
    """Whether rules and their numbers may be chosen on this figure; it is then no evidence for them."""
    return set_name in CHOSEN_SETS and seed in CHOSEN_ON.get(attack, ())
