"""Attack success on a model with its interval, and the rate of the true class.

An attack is judged by one of three measures, which its entry in the manifest names ("judged"):

backdoor        test pictures of other classes than the target, with the trigger: success = read as the target (Gu et
                al. 2017)
single_target   the target pictures themselves: success = read as their adversarial class (Carlini and Terzis 2022)
class_to_class  test pictures of the source class, those whose caption has the source phrase if the attack has one:
                success = read as the target class (Yang et al. 2023)
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch

from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.testset import TestSet
from pipeline.evaluation.zero_shot import predicted_classes
from shards.errors import UserError
from shards.samples.overlay import Overlay, Trigger

TOOK = 0.8  # an undefended attack below this success did not take, and its defence shows nothing


class AttackSuccess:
    """The attacks of an overlay on a test set. Called with (encoder, image_ND, classes_KD): {NAME: figures}.

    figures: "judged"; "success", "base" and "true_class" as fractions of 1; "interval", [low, high] of the success:
    Wilson's at 95 %; "count", the pictures judged. base: the same pictures without the trigger (backdoor); other test
    pictures of the targets' classes that are read as the adversarial class (single_target); pictures of the source
    class without the phrase that are read as the target (class_to_class), None where there are none. true_class:
    pictures judged that are read as what they are.

    attacked_N: bool (N,), the test pictures that are to be misread as they are: the targets, and those that
    class-to-class attacks are about. No base but a backdoor's counts them. No figure counts pictures that cannot be
    read.
    """

    def __init__(self, test: TestSet, overlay: Overlay):
        """Raises UserError where an attack cannot be judged on this test set."""
        for number, (ours, others) in enumerate(zip_longest(overlay.classes, test.classnames)):
            if ours != others:
                raise UserError(
                    f"data.overlay: class {number} of its {len(overlay.classes)} classes is {ours!r}, "
                    f"of the {len(test.classnames)} of evaluation.test, {test.root}/classnames.txt, it is {others!r}; "
                    "evaluate on the test set that the attack was made with, or make it again with `safeclip attack`"
                )
        makers: dict[str, type[Judged]] = {
            "backdoor": Backdoor,
            "single_target": SingleTarget,
            "class_to_class": ClassToClass,
        }
        self.attacks: dict[str, Judged] = {}
        self.attacked_N = np.zeros(len(test.label_N), bool)
        for name, settings in overlay.kinds.items():
            if settings["judged"] == "single_target" and overlay.source_fingerprint != test.samples.index.fingerprint:
                raise UserError(
                    f"evaluation.test: attack {name} has targets in {overlay.source_index}, which holds other shards "
                    "than the test set; evaluate on that one, or make the attack again with `safeclip attack`"
                )
            self.attacks[name] = makers[settings["judged"]].of(test, settings, overlay.trigger(name))
            if not len(self.attacks[name].row_M):
                raise UserError(f"evaluation.test: {test.root} has no picture on which attack {name} can be judged")
            if settings["judged"] != "backdoor":
                self.attacked_N[self.attacks[name].row_M] = True

    def __call__(self, encoder: Encoder, image_ND: torch.Tensor, classes_KD: torch.Tensor) -> dict[str, dict]:
        clean_N = predicted_classes(image_ND, classes_KD)
        found = {}
        for name, attack in self.attacks.items():
            seen_M = clean_N[attack.row_M] >= 0
            if not seen_M.any():
                raise UserError(f"evaluation.test: no picture on which attack {name} is judged can be read")
            found[name] = attack.judge(encoder, classes_KD, clean_N, seen_M, ~self.attacked_N & (clean_N >= 0))
        return found


class Judged(Protocol):
    """An attack on a test set, of which the pictures row_M, int64 (M,), are judged."""

    row_M: np.ndarray

    @classmethod
    def of(cls, test: TestSet, settings: dict, trigger: Trigger | None) -> "Judged":
        """`settings`: its entry in the manifest. Raises UserError."""

    def judge(
        self, encoder: Encoder, classes_KD: torch.Tensor, clean_N: np.ndarray, seen_M: np.ndarray, other_N: np.ndarray
    ) -> dict:
        """Its figures. clean_N, int64 (N,), is what the test pictures are read as; seen_M, bool (M,), which of row_M
        can be read; other_N, bool (N,), the pictures that can be read and that no attack is about."""


@dataclass
class Backdoor:
    """row_M: the test pictures of other classes than the target."""

    test: TestSet
    row_M: np.ndarray
    target: int
    trigger: Trigger

    @classmethod
    def of(cls, test: TestSet, settings: dict, trigger: Trigger | None) -> "Backdoor":
        target = settings["target_class"]
        return cls(test, np.flatnonzero(test.label_N != target), target, trigger)

    def judge(
        self, encoder: Encoder, classes_KD: torch.Tensor, clean_N: np.ndarray, seen_M: np.ndarray, other_N: np.ndarray
    ) -> dict:
        row_M = self.row_M[seen_M]
        places = [self.test.place_N[row] for row in row_M]
        read_M = predicted_classes(encoder.pictures(self.test.samples, places, self.trigger), classes_KD)
        return {
            "judged": "backdoor",
            **success(read_M == self.target),
            "base": float((clean_N[row_M] == self.target).mean()),
            "true_class": float((read_M == self.test.label_N[row_M]).mean()),
        }


@dataclass
class SingleTarget:
    """row_M: the target pictures; true_M and adversarial_M: their class, and the one that the attacker wants read."""

    test: TestSet
    row_M: np.ndarray
    true_M: np.ndarray
    adversarial_M: np.ndarray

    @classmethod
    def of(cls, test: TestSet, settings: dict, trigger: Trigger | None) -> "SingleTarget":
        targets = settings["targets"]
        rows = [test.row(target["shard"], target["position"]) for target in targets]
        classes = [[target[name] for target in targets] for name in ("true_class", "adversarial_class")]
        return cls(test, *(np.array(values, np.int64) for values in (rows, *classes)))

    def judge(
        self, encoder: Encoder, classes_KD: torch.Tensor, clean_N: np.ndarray, seen_M: np.ndarray, other_N: np.ndarray
    ) -> dict:
        row_M, true_M, adversarial_M = (values[seen_M] for values in (self.row_M, self.true_M, self.adversarial_M))
        base = []
        for true, adversarial in zip(true_M, adversarial_M):
            alike_N = other_N & (self.test.label_N == true)
            if alike_N.any():
                base.append((clean_N[alike_N] == adversarial).mean())
        return {
            "judged": "single_target",
            **success(clean_N[row_M] == adversarial_M),
            "base": float(np.mean(base)) if base else None,
            "true_class": float((clean_N[row_M] == true_M).mean()),
        }


@dataclass
class ClassToClass:
    """row_M: test pictures of the source class that the attack is about."""

    test: TestSet
    row_M: np.ndarray
    source: int
    target: int

    @classmethod
    def of(cls, test: TestSet, settings: dict, trigger: Trigger | None) -> "ClassToClass":
        source, phrase = settings["source_class"], settings.get("source_phrase")
        meant_N = np.ones(len(test.label_N), bool)
        if phrase:
            if test.captions is None:
                raise UserError(
                    f"evaluation.test: an attack has the source phrase {phrase!r}, "
                    f"but {test.root} has no test_captions; "
                    f"index its shards with `safeclip index SHARDS --text txt --out {test.root}/test_captions`"
                )
            meant_N = np.array([phrase.lower() in " ".join(texts).lower() for texts in test.captions])
        return cls(test, np.flatnonzero((test.label_N == source) & meant_N), source, settings["target_class"])

    def judge(
        self, encoder: Encoder, classes_KD: torch.Tensor, clean_N: np.ndarray, seen_M: np.ndarray, other_N: np.ndarray
    ) -> dict:
        row_M, other_M = self.row_M[seen_M], np.flatnonzero(other_N & (self.test.label_N == self.source))
        return {
            "judged": "class_to_class",
            **success(clean_N[row_M] == self.target),
            "base": float((clean_N[other_M] == self.target).mean()) if len(other_M) else None,
            "true_class": float((clean_N[row_M] == self.source).mean()),
        }


def success(hit_M: np.ndarray) -> dict:
    """{"success", "interval": [low, high], "count"} of bool (M,): Wilson's 95 % interval of a fraction (Wilson
    1927)."""
    from scipy.stats import binomtest  # here: every start would wait for it

    interval = binomtest(int(hit_M.sum()), len(hit_M)).proportion_ci(method="wilson")
    return {
        "success": float(hit_M.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "count": len(hit_M),
    }
