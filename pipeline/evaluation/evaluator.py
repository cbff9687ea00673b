"""What is measured of a model after an epoch, and of a finished run."""

import torch

from pipeline.config.schema import Evaluation
from pipeline.evaluation.attack_success import AttackSuccess
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.testset import TestSet
from pipeline.evaluation.zero_shot import top_k_accuracy, zero_shot_classifier
from shards.errors import UserError
from shards.samples.overlay import Overlay
from shards.views.loader import Views


class Evaluator:
    """Called with (towers, views, device) by all ranks: {"clean_top1", "clean_top5", "unreadable", "retrieval",
    "attacks"}, the same on every rank.

    clean_top1, clean_top5: zero-shot accuracy, fractions of 1, on the pictures that no attack is to have misread as
    they are (AttackSuccess.attacked_N). unreadable: number of the test pictures that cannot be read, which no figure
    counts. retrieval: as of retrieval.retrieval, or None without test captions. attacks: as of
    attack_success.AttackSuccess. What a run's eval.json makes of them: pipeline/evaluation/run.py.
    """

    def __init__(self, config: Evaluation, overlay: Overlay | None = None):
        """`overlay`: the attacks, or None. Raises UserError when the test set is missing or damaged."""
        self.test = TestSet(config)
        self.attacks = AttackSuccess(self.test, overlay) if overlay else None

    def __call__(self, towers: torch.nn.Module, views: Views, device: torch.device) -> dict:
        was_training = towers.training
        towers.eval()
        encoder = Encoder(towers, views, device)
        figures = self.judge(encoder, self.encode(encoder))
        towers.train(was_training)
        return figures

    def encode(self, encoder: Encoder) -> torch.Tensor:
        """float32 (N, D), unit length: the test pictures."""
        return encoder.pictures(self.test.samples, self.test.place_N)

    def judge(self, encoder: Encoder, image_ND: torch.Tensor) -> dict:
        """The figures of a model in eval mode, of which image_ND are the embeddings of the test pictures. Raises
        UserError where no picture is left to count."""
        readable_N = image_ND.any(1).cpu().numpy()
        clean_N = readable_N & ~self.attacks.attacked_N if self.attacks else readable_N
        if not clean_N.any():
            raise UserError(
                f"evaluation.test: of the {len(image_ND)} pictures of {self.test.root} {readable_N.sum()} can be read, "
                "and attacks are about all of these; clean accuracy needs others"
            )
        captions = [texts for texts, readable in zip(self.test.captions or [], readable_N) if readable]
        classes_KD = zero_shot_classifier(encoder, self.test.classnames, self.test.templates)
        top1, top5 = (top_k_accuracy(image_ND[clean_N], classes_KD, self.test.label_N[clean_N], k) for k in (1, 5))
        return {
            "clean_top1": top1,
            "clean_top5": top5,
            "unreadable": int((~readable_N).sum()),
            "retrieval": retrieval(encoder, image_ND[readable_N], captions) if any(captions) else None,
            "attacks": self.attacks(encoder, image_ND, classes_KD) if self.attacks else {},
        }
