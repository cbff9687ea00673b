"""Zero-shot accuracy on a labelled test set."""

from pipeline.evaluation.evaluators.base import Evaluator
from pipeline.evaluation.held_out import Embedded, HeldOut
from pipeline.evaluation.zero_shot import top_k_accuracy
from shards.errors import UserError


class ZeroShot(Evaluator):
    """{"clean_top1", "clean_top5", "unreadable"}.

    clean_top1, clean_top5: on the pictures that no attack is to have misread as they are (AttackSuccess.attacked_N).
    unreadable: number of the test pictures that cannot be read, which no figure counts.
    """

    name, needs = "zero_shot", "a test set with labels (evaluation.test=DIR)"

    def __init__(self, data: HeldOut):
        super().__init__(data)
        self.attacks = data.attacks

    @classmethod
    def possible(cls, data: HeldOut) -> bool:
        return data.test is not None

    def __call__(self, embedded: Embedded) -> dict:
        test, readable_N = self.data.test, embedded.readable_N
        clean_N = readable_N & ~self.attacks.attacked_N if self.attacks else readable_N
        if not clean_N.any():
            raise UserError(
                f"evaluation.test: of the {len(clean_N)} pictures of {test.root} {readable_N.sum()} can be read, "
                "and attacks are about all of these; clean accuracy needs others"
            )
        image_MD, label_M = embedded.image_ND[clean_N], test.label_N[clean_N]
        return {
            "clean_top1": top_k_accuracy(image_MD, embedded.classes_KD, label_M, 1),
            "clean_top5": top_k_accuracy(image_MD, embedded.classes_KD, label_M, 5),
            "unreadable": int((~readable_N).sum()),
        }

    def line(self, figures: dict) -> str:
        return f"clean {figures['clean_top1']:.1%}"
