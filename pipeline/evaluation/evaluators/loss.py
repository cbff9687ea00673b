"""Contrastive loss of held-out pairs: CLIP's symmetric InfoNCE (Radford et al. 2021, figure 3) at the model's own
temperature."""

import torch
from torch.nn import functional as F

from pipeline.evaluation.evaluators.base import Evaluator
from pipeline.evaluation.held_out import Embedded, HeldOut

BATCH = 256  # pairs; the loss of a model that knows nothing is log(256) = 5.55


class Loss(Evaluator):
    """{"pairs": {"count", "unreadable", "loss"}}: None without a pair that can be read."""

    name, needs = "loss", "held-out pairs (evaluation.pairs=INDEX)"

    @classmethod
    def possible(cls, data: HeldOut) -> bool:
        return data.pairs is not None

    def __call__(self, embedded: Embedded) -> dict:
        pairs, loss = embedded.pairs, None
        if len(pairs.image_ND):
            scale = embedded.scale[:1]  # InfoNCE also of a model with a logit bias, so that losses compare
            loss = contrastive_loss(pairs.image_ND, pairs.text_UD[pairs.text_N], scale)
        return {"pairs": {**pairs.counts, "loss": loss}}

    def line(self, figures: dict) -> str:
        loss = figures["pairs"]["loss"]
        return "held-out loss ?" if loss is None else f"held-out loss {loss:.4f}"


def contrastive_loss(image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor, batch: int = BATCH) -> float:
    """Mean over batches of `batch` pairs, in order, of (CE(picture -> captions) + CE(caption -> pictures)) / 2, with
    the batch's other pairs as negatives and logits scale * cosine.

    image_ND, text_ND: float32, unit length, N > 0. All batches have the same size, as the loss depends on it: pairs
    after the last whole batch are left out, unless there is no whole one.
    """
    losses = []
    for at in range(0, len(image_ND) // batch * batch or 1, batch):
        logits_BB = scale * image_ND[at : at + batch] @ text_ND[at : at + batch].T
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        losses.append((F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2)
    return float(torch.stack(losses).double().mean())
