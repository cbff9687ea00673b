"""Number formats of a step: bf16 or fp32, and TF32 for what is fp32 on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config.schema import Config
from pipeline.distributed import comm


def precision_here(precision: str) -> str:
    """fp32 or bf16; "auto" is bf16 where this process has a GPU that calculates in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def with_precision(config: Config) -> Config:
    """`config` with "auto" replaced by what it means on this run's processes: bf16 where all have it. All ranks call.

    The run's config.yaml and hash have the value, so that a resume where "auto" means another one is refused.
    """
    (fp32,) = comm.all_reduce_max(precision_here(config.train.precision) == "fp32")
    train = config.train.model_copy(update={"precision": "fp32" if fp32 else "bf16"})
    return config.model_copy(update={"train": train})


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 matrices and convolutions in TF32 on GPUs that have it. Scores and guards are calculated
    outside of it, where comm has switched off both."""
    if not torch.cuda.is_available():
        yield
        return
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
