"""Batches for single steps of very small models."""

import copy

import torch

from pipeline.distributed import comm
from pipeline.training.model import Towers, build_model, pixel_stats
from shards.views.batch import Batch

ROWS = 8
KINDS = ("clip", "crossed", "unimodal", "match", "cleanclip")  # crossed: the CLIP loss over two views


def towers(config):
    torch.manual_seed(0)
    return Towers(build_model({"config": copy.deepcopy(config)}), *pixel_stats())


def global_batch(kind, size, step=0):
    """(images, tokens, valid) of ROWS rows, in the views of the loss. Rows 0 to 4 hold three bad ones, rows 4 to 8
    none."""
    torch.manual_seed(100 + step)
    views = {"clip": 1, "crossed": 2, "unimodal": 2, "match": 1, "cleanclip": 2}[kind]
    images = torch.randint(0, 256, (views, ROWS, 3, size, size), dtype=torch.uint8)
    tokens = torch.randint(1, 63, (views, ROWS, 8))
    return (
        images,
        tokens,
        torch.tensor([True, False, False, True] + [True] * (ROWS - 4)) if step == 0 else torch.arange(ROWS) >= 4,
    )


def own_rows(whole):
    """This rank's rows of a global batch, as a Batch."""
    images, tokens, valid = whole
    rows = ROWS // comm.world()
    mine = slice(comm.rank() * rows, (comm.rank() + 1) * rows)
    return Batch(
        images[:, mine].flatten(0, 1), tokens[:, mine].flatten(0, 1), valid[mine], torch.arange(ROWS)[mine], []
    )
