"""The step of a batch that does not fit: each rank forwards its rows in parts (`train.accumulate`).

A contrastive loss needs the embeddings of the whole batch, so the sum of the losses of its parts is another loss.
GradCache (Gao et al. 2021, arXiv:2101.06983, section 3; open_clip's --accum-freq) forwards the parts without a graph,
takes the loss and its gradient of the embeddings, and forwards each part once more, now with the gradient of its
embeddings. A step costs two forward passes and one backward pass, and holds the activations of one part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.training.batchnorm import batch_norms
from shards.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image_BD, text_BD and scale, as model.Towers gives them


def backward_in_parts(
    engine: DeepSpeedEngine, images_BCHW: Tensor, tokens_BL: Tensor, parts: int, loss_of: LossOf
) -> tuple[Tensor, list[Tensor]]:
    """(loss, [image_BD, text_BD, scale]), both without a graph. The engine has the gradients of
    loss_of(image_BD, text_BD, scale), and is ready for its step.

    B rows are taken in so many parts; all ranks call, with the same number. A part draws the same random numbers
    (dropout) in both of its forward passes.
    """
    part_of = list(zip(images_BCHW.tensor_split(parts), tokens_BL.tensor_split(parts)))
    draws, found = [], []
    with torch.no_grad():
        for part in part_of:
            draws.append(random_state(images_BCHW.device))
            found.append(engine(*part))
    image_parts, text_parts, (scale, *_) = zip(*found)
    leaves = [x.detach().requires_grad_() for x in (torch.cat(image_parts), torch.cat(text_parts), scale)]
    loss = loss_of(*leaves)
    loss.backward()
    image_grad_BD, text_grad_BD, scale_grad = (leaf.grad for leaf in leaves)
    grads = list(zip(image_grad_BD.tensor_split(parts), text_grad_BD.tensor_split(parts)))
    for number, (part, (image_grad_PD, text_grad_PD)) in enumerate(zip(part_of, grads)):
        set_random_state(images_BCHW.device, draws[number])
        engine.set_gradient_accumulation_boundary(number == parts - 1)
        image_PD, text_PD, scale = engine(*part)
        # Its gradient is that of the loss. Every parameter takes part in every backward pass (ZeRO-3).
        product = (image_PD * image_grad_PD).sum() + (text_PD * text_grad_PD).sum()
        engine.backward(product + (scale * scale_grad).sum() / parts)
    return loss.detach(), [leaf.detach() for leaf in leaves]


def random_state(device: torch.device) -> list[Tensor]:
    """State of torch's generators of the CPU and of `device`."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def check_parts(towers: nn.Module, rows: int, parts: int) -> None:
    """Raise UserError where `parts` are more than a rank's rows, or the model has batch norm: the statistics would be
    those of a part, and another model would be trained."""
    if parts > rows:
        raise UserError(
            f"train.accumulate: got {parts}, but a process has only {rows} of the rows of a batch; take at most {rows}"
        )
    if parts > 1 and (found := batch_norms(towers)):
        raise UserError(
            f"train.accumulate: got {parts}, but the model has batch norm ({found[0]} ...), which needs all rows at "
            "once; set train.accumulate=1, or take a model without, such as ViT-B-32"
        )
