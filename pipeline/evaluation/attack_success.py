"""What attacks achieve on a model: success, its interval, and how often the truth is read.

An attack is judged by one of three measures, which its entry in the manifest names ("judged"):

backdoor        test pictures of other classes than the target, with the trigger: success = read as the target (Gu et al. 2017)
single_target   the target pictures themselves: success = read as their adversarial class (Carlini and Terzis 2022)
class_to_class  test pictures of the source class, those whose caption has the source phrase if the attack has one: success = read as
                the target class (Yang et al. 2023)
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from pipeline.evaluation.testset import TestSet
from pipeline.evaluation.zero_shot import predicted_classes
from shards.errors import UserError
from shards.overlay import Overlay

TOOK = 0.8  # an undefended attack below this success did not take, and its defence shows nothing


class AttackSuccess:
    """The attacks of an overlay on a test set. Called with (encoder, image_ND, classes_KD): {NAME: figures}, a dict for each attack.

    figures: "judged"; "success", "base" and "true_class" as shares of 1; "interval", [low, high] of the success: Wilson's at 95 %;
    "count", the pictures judged. base: the same pictures without the trigger (backdoor); other test pictures of the targets' classes that are
    read as the adversarial class (single_target); pictures of the source class without the phrase that are read as the target
    (class_to_class), None where there are none. true_class: pictures judged that are read as what they are.
    """

    def __init__(self, test: TestSet, overlay: Overlay):
        """`test`: testset.TestSet; `overlay`: shards.overlay.Overlay. Raises UserError where an attack cannot be judged on this test set."""
        makers = {"backdoor": Backdoor, "single_target": SingleTarget, "class_to_class": ClassToClass}
        self.attacks = {}
        for name, settings in overlay.kinds.items():
            if settings["judged"] == "single_target" and overlay.source_fingerprint != test.samples.index.fingerprint:
                raise UserError(
                    f"evaluation.test: attack {name} has targets in {overlay.source_index}, which holds other shards than the "
                    "test set; evaluate on that one, or make the attack again with `safeclip attack`"
                )
            self.attacks[name] = makers[settings["judged"]].of(test, settings, overlay.trigger(name))
            if not len(self.attacks[name].row_M):
                raise UserError(f"evaluation.test: {test.root} has no picture on which attack {name} can be judged")

    def __call__(self, encoder, image_ND, classes_KD):
        clean_N = predicted_classes(image_ND, classes_KD)
        return {name: attack.judge(encoder, classes_KD, clean_N) for name, attack in self.attacks.items()}


@dataclass
class Backdoor:
    """row_M: the test pictures of other classes than the target."""

    test: TestSet
    row_M: np.ndarray
    target: int
    trigger: object

    @classmethod
    def of(cls, test, settings, trigger):
        target = settings["target_class"]
        return cls(test, np.flatnonzero(test.label_N != target), target, trigger)

    def judge(self, encoder, classes_KD, clean_N):
        places = [self.test.place_N[row] for row in self.row_M]
        read_M = predicted_classes(encoder.pictures(self.test.samples, places, self.trigger), classes_KD)
        return {
            "judged": "backdoor",
            **success(read_M == self.target),
            "base": float((clean_N[self.row_M] == self.target).mean()),
            "true_class": float((read_M == self.test.label_N[self.row_M]).mean()),
        }


@dataclass
class SingleTarget:
    """row_M: the target pictures; true_M and adversarial_M: their class, and the one that the attacker wants read."""

    test: TestSet
    row_M: np.ndarray
    true_M: np.ndarray
    adversarial_M: np.ndarray

    @classmethod
    def of(cls, test, settings, trigger):
        targets = settings["targets"]
        rows = [test.row(target["shard"], target["position"]) for target in targets]
        classes = [[target[name] for target in targets] for name in ("true_class", "adversarial_class")]
        return cls(test, *(np.array(values, np.int64) for values in (rows, *classes)))

    def judge(self, encoder, classes_KD, clean_N):
        bystander_N = np.ones(len(clean_N), bool)
        bystander_N[self.row_M] = False
        base = []
        for true, adversarial in zip(self.true_M, self.adversarial_M):
            alike_N = bystander_N & (self.test.label_N == true)
            if alike_N.any():
                base.append((clean_N[alike_N] == adversarial).mean())
        return {
            "judged": "single_target",
            **success(clean_N[self.row_M] == self.adversarial_M),
            "base": float(np.mean(base)) if base else None,
            "true_class": float((clean_N[self.row_M] == self.true_M).mean()),
        }


@dataclass
class ClassToClass:
    """row_M: test pictures of the source class that the attack is about; other_M: those that it is not about."""

    row_M: np.ndarray
    other_M: np.ndarray
    source: int
    target: int

    @classmethod
    def of(cls, test, settings, trigger):
        source, phrase = settings["source_class"], settings.get("source_phrase")
        meant_N = np.ones(len(test.label_N), bool)
        if phrase:
            if test.captions is None:
                raise UserError(
                    f"evaluation.test: an attack has the source phrase {phrase!r}, but {test.root} has no test_captions; index its "
                    f"shards with `safeclip index SHARDS --text txt --out {test.root}/test_captions`"
                )
            meant_N = np.array([phrase.lower() in " ".join(texts).lower() for texts in test.captions])
        of_source_N = test.label_N == source
        rows, others = np.flatnonzero(of_source_N & meant_N), np.flatnonzero(of_source_N & ~meant_N)
        return cls(rows, others, source, settings["target_class"])

    def judge(self, encoder, classes_KD, clean_N):
        return {
            "judged": "class_to_class",
            **success(clean_N[self.row_M] == self.target),
            "base": float((clean_N[self.other_M] == self.target).mean()) if len(self.other_M) else None,
            "true_class": float((clean_N[self.row_M] == self.source).mean()),
        }


def success(hit_M: np.ndarray) -> dict:
    """{"success", "interval": [low, high], "count"} of bool (M,): Wilson's 95 % interval of a share (Wilson 1927)."""
    interval = binomtest(int(hit_M.sum()), len(hit_M)).proportion_ci(method="wilson")
    return {
        "success": float(hit_M.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "count": len(hit_M),
    }
