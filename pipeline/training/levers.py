"""What makes a step of training cheaper and leaves the model what it is: the weights have the same names and shapes."""

import os
import shutil
from importlib.util import find_spec

import open_clip
import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn

from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.training.accumulation import check_parts
from pipeline.training.batchnorm import batch_norms, running_statistics
from pipeline.training.model import Towers
from shards.errors import UserError


def apply_levers(towers: Towers, config: Config) -> None:
    """Make `towers`, in place, ready for training by `config`. Raises UserError for what the model cannot do."""
    train = config.train
    if train.precision == "bf16" and comm.device().type == "cpu" and running_statistics(towers):
        raise UserError(
            "train.precision: got bf16, but the model has batch norm, whose statistics stay fp32, and CPUs mix no "
            "formats; set train.precision=fp32"
        )
    check_parts(towers, train.batch_size // comm.world(), train.accumulate)
    if config.model.patch_dropout:
        drop_patches(towers.clip.visual, config.model.patch_dropout)
    if train.checkpoint_activations:
        checkpoint_activations(towers.clip)
    if train.compile:
        check_compiler(comm.device())
        compile_towers(towers.clip, train.zero_stage)


def drop_patches(visual: nn.Module, fraction: float) -> None:
    """In training a picture is seen by a random part of its patches, drawn on the device (FLIP, Li et al. 2023,
    arXiv:2212.00794). Raises UserError for what is no vision transformer."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        visual.patch_dropout = PatchDropout(fraction)
    elif isinstance(trunk := getattr(visual, "trunk", None), TimmTransformer):
        trunk.patch_drop = PatchDropout(fraction, trunk.num_prefix_tokens)
    else:
        name = type(getattr(visual, "trunk", visual)).__name__
        raise UserError(
            f"model.patch_dropout: got {fraction}, but the image tower is a {name}; "
            "set model.patch_dropout=0, or take a vision transformer such as ViT-B-32"
        )


def checkpoint_activations(clip: open_clip.CLIP) -> None:
    """Each block of the towers keeps its input only, and is calculated once more in the backward pass (Chen et al.
    2016, arXiv:1604.06174). Raises UserError where the image tower cannot."""
    clip.set_grad_checkpointing()
    able = any(getattr(module, "grad_checkpointing", False) for module in clip.visual.modules())
    if not able or batch_norms(clip.visual):  # which would count a batch twice in its running statistics
        name = type(getattr(clip.visual, "trunk", clip.visual)).__name__
        raise UserError(
            f"train.checkpoint_activations: the image tower is a {name}, which has batch norm or no such blocks; "
            "set train.checkpoint_activations=false, or take a vision transformer such as ViT-B-32"
        )


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would find no compiler in the first step."""
    name = "Triton" if device.type == "cuda" else os.environ.get("CXX", "g++")
    if not (find_spec("triton") if device.type == "cuda" else shutil.which(name)):
        raise UserError(f"train.compile: {name} was not found; install it, or set train.compile=false")


def compile_towers(clip: open_clip.CLIP, zero_stage: int, backend: str = "inductor") -> None:
    """torch.compile of both towers, in place, at their first forward pass. Raises UserError at ZeRO-3."""
    if zero_stage == 3:  # its hooks gather the weights of every layer, and cut the graph there
        raise UserError(
            "train.compile: does not go with train.zero_stage 3; set train.compile=false or train.zero_stage=2"
        )
    for tower in (clip.visual, getattr(clip, "text", None) or clip.transformer):
        tower.compile(backend=backend)  # of the module's call: no other module, so no other names of weights
