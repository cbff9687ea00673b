"""One step of training: forward, the loss by its kind, backward, optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.training import engine as engines
from pipeline.training.accumulation import backward_in_parts
from pipeline.training.batchnorm import running_statistics
from pipeline.training.losses import clip_loss, info_nce, unimodal_loss
from pipeline.training.precision import tf32
from pipeline.training.support_queue import SupportQueue
from shards.views.batch import Batch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@tf32()
def train_step(
    engine: DeepSpeedEngine, queues: dict[str, SupportQueue], batch: Batch, kind: str, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """One step on this rank's rows; the gradient is that of the global batch. parts: in which the rows are forwarded.

    Returns (loss, scale of model.Towers, finite). finite: False if the gradient was infinite or NaN and the step was
    skipped: then weights, optimizer and statistics of batch norm are what they were.
    """

    def loss_of(image_BD: torch.Tensor, text_BD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return step_loss(kind, image_BD, text_BD, scale, queues, batch.valid)

    statistics = running_statistics(engine.module)
    before = [value.clone() for value in statistics]
    if parts > 1:
        loss, (image_BD, text_BD, scale) = backward_in_parts(engine, batch.images, batch.tokens, parts, loss_of)
    else:
        image_BD, text_BD, scale = engine(batch.images, batch.tokens)
        loss = loss_of(image_BD, text_BD, scale)
        engine.backward(loss)
    finite, rows = engines.step(engine), len(batch.valid)
    if finite and kind == "unimodal":
        queues["image"].push(image_BD[:rows], batch.valid)
    if finite and kind in ("unimodal", "match"):
        queues["text"].push(text_BD[:rows], batch.valid)
    if not finite:
        for value, old in zip(statistics, before):
            value.copy_(old)
    engines.clamp_logit_scale(engine)
    return loss.detach(), scale.detach(), finite


def step_loss(
    kind: str,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    queues: dict[str, SupportQueue],
    valid_B: torch.Tensor,
) -> torch.Tensor:
    """0-d: the loss of a step by its kind (curriculum.Step.loss). Rows of the embeddings are [first views, second
    views]; where there is one view it is both."""
    views = len(image_BD) // len(valid_B)
    image1_BD, image2_BD = (image_BD.chunk(views)[view] for view in (0, -1))
    text1_BD, text2_BD = (text_BD.chunk(views)[view] for view in (0, -1))
    if kind == "clip":
        return clip_loss(image1_BD, text1_BD, image2_BD, text2_BD, scale, valid_B)
    if kind == "unimodal":
        near_image_BD, near_text_BD = queues["image"].search(image1_BD), queues["text"].search(text1_BD)
        return unimodal_loss(image2_BD, text2_BD, near_image_BD, near_text_BD, scale, valid_B)
    if kind == "match":
        # The captions' own embeddings have weight zero: every parameter takes part in every step.
        near_BD = queues["text"].search(image1_BD)
        return clip_loss(image1_BD, near_BD, image1_BD, near_BD, scale, valid_B) + 0.0 * text1_BD.sum()
    # cleanclip: view 1 is the plain pair, view 2 an augmented one (Bansal et al. 2023).
    across = clip_loss(image1_BD, text1_BD, image1_BD, text1_BD, scale, valid_B)
    return across + (info_nce(image1_BD, image2_BD, scale, valid_B) + info_nce(text1_BD, text2_BD, scale, valid_B)) / 2
