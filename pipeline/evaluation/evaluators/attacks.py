"""Success of the attacks of data.overlay on a labelled test set."""

from pipeline.evaluation.evaluators.base import Evaluator
from pipeline.evaluation.held_out import Embedded, HeldOut


class Attacks(Evaluator):
    """{"attacks": {NAME: figures}}, as of attack_success.AttackSuccess."""

    name = "attacks"
    needs = "a test set with labels (evaluation.test=DIR) and an attack (data.overlay=DIR)"

    def __init__(self, data: HeldOut):
        super().__init__(data)
        self.attacks = data.attacks

    @classmethod
    def possible(cls, data: HeldOut) -> bool:
        return data.test is not None and data.overlay is not None

    def __call__(self, embedded: Embedded) -> dict:
        return {"attacks": self.attacks(embedded.encoder, embedded.image_ND, embedded.classes_KD)}

    def line(self, figures: dict) -> str:
        return ", ".join(f"{name} {attack['success']:.1%}" for name, attack in figures["attacks"].items())
