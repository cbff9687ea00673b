"""Floating-point operations of a model, and the peak rate of a device: what the model FLOPs utilization is made of."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.distributed import comm
from pipeline.training.model import build_model, open_clip_config, picture_size

# 1e12 operations a second of matrix products without sparsity: bfloat16, TensorFloat-32 (NVIDIA's data sheets). The
# first name that is a part of the device's name counts.
PEAK = {
    "B200": (2250, 1125),
    "GH200": (989, 495),
    "H200 NVL": (835, 418),
    "H200": (989, 495),
    "H100 NVL": (835, 418),
    "H100 PCIe": (756, 378),
    "H100": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L4": (121, 60),
    "A10": (125, 62.5),
}


def flops_a_view(model: dict) -> int | None:
    """Operations of a forward and backward pass of both towers for one picture and one caption; the losses and what is
    computed once more in the backward pass do not count.

    model: as for build_model. A multiplication and an addition are two operations. Nothing is computed: the model is
    built on torch's meta device, for two pairs (batch norm needs them). None for a Hugging Face tower: those look into
    their tensors.
    """
    if "hf_model_name" in open_clip_config(model)["text_cfg"]:
        return None
    size = picture_size(model)
    with torch.device("meta"):
        clip = build_model(model)
        pixels_BCHW, tokens_BL = torch.zeros(2, 3, size, size), torch.zeros(2, clip.context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        (clip.encode_image(pixels_BCHW).sum() + clip.encode_text(tokens_BL).sum()).backward()
    return counter.get_total_flops() // 2


def least_seconds(model: dict, device: torch.device, precision: str) -> float | None:
    """Seconds that all devices of the run together take for a view at least; None where their peak is not known."""
    peak = peak_flops(device, precision)
    flops = flops_a_view(model) if peak else None
    return flops / (peak * comm.world()) if peak and flops else None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that a GPU reaches at most in matrix products of this precision; None where it is not known.

    precision: "bf16", or "fp32", which is TensorFloat-32 in a training step (precision.tf32).
    """
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device), precision)


def peak_of_name(name: str, precision: str) -> float | None:
    """`peak_flops` of a device by the name that CUDA gives it."""
    for part, peaks in PEAK.items():
        if f" {part} " in f" {name.replace('-', ' ')} ":
            return 1e12 * peaks[0 if precision == "bf16" else 1]
    return None
