"""Zero-shot classification: a picture's class is the one whose prompts' mean embedding is nearest (Radford et al. 2021,
section 3.1)."""

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.evaluation.encoding import Encoder


def zero_shot_classifier(encoder: Encoder, classnames: list[str], templates: list[str]) -> torch.Tensor:
    """float32 (K, D), unit length: for each class the mean embedding of its prompts. `templates` hold {c} in place of
    the class name."""
    prompts = [template.replace("{c}", name) for name in classnames for template in templates]
    text_KTD = encoder.texts(prompts).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(text_KTD.mean(1), dim=-1)


def predicted_classes(image_ND: torch.Tensor, classes_KD: torch.Tensor) -> np.ndarray:
    """int64 (N,): the class that each picture is read as, -1 where it cannot be read
    (encoding.Encoder.pictures)."""
    read_N = (image_ND @ classes_KD.T).argmax(1)
    return read_N.masked_fill(~image_ND.any(1), -1).cpu().numpy()


def top_k_accuracy(image_ND: torch.Tensor, classes_KD: torch.Tensor, label_N: np.ndarray, k: int) -> float | None:
    """Fraction of the pictures whose label is among the k nearest classes; None for fewer than k classes or no
    picture.

    image_ND, classes_KD: float32, unit length; label_N: int64 (N,).
    """
    if len(classes_KD) < k or not len(image_ND):
        return None
    nearest_NK = (image_ND @ classes_KD.T).topk(k).indices
    label_N1 = torch.from_numpy(label_N).to(nearest_NK.device)[:, None]
    return float((nearest_NK == label_N1).any(1).double().mean())
