"""The exponential moving average of a model's weights (Polyak and Juditsky 1992), for evaluation and export.

After every step t: average <- d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)), so that the
first weights are soon forgotten. Each rank keeps its part of every parameter, in fp32; with bf16 the weights are those
that the forward pass uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from pipeline.distributed import comm

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

NAME = "average.safetensors"  # of a checkpoint; beside model.safetensors, in the same form


class WeightAverage:
    """Of the CLIP in `engine`, from its present weights on. parts: {name: (P,)}, this rank's ceil(numbers / ranks) of
    each parameter, as ZeRO-3 divides it; the last ones are padding."""

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self.engine, self.clip, self.decay = engine, engine.module.clip, decay
        self.parts = {name: part.float().clone() for name, part in self.weights().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of each parameter as it is now."""
        return {name: self.part_of(value) for name, value in self.clip.named_parameters()}

    def part_of(self, value: torch.Tensor) -> torch.Tensor:
        """(P,): this rank's part of a parameter, or of a whole tensor like one."""
        if hasattr(value, "ds_tensor"):  # ZeRO-3
            return value.ds_tensor.detach()
        size = -(-value.numel() // comm.world())
        part = value.detach().flatten()[comm.rank() * size :][:size]
        return torch.nn.functional.pad(part, (0, size - len(part)))

    def update(self, step: int) -> None:
        """Called after step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [part.float() for part in self.weights().values()]
        torch._foreach_lerp_(list(self.parts.values()), weights, 1 - decay)

    def whole(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The average of one parameter. All ranks call."""
        part = self.parts[name]
        return comm.all_gather_rows(part[:, None], [len(part)] * comm.world()).flatten()[: shape.numel()].view(shape)

    def state(self) -> dict[str, torch.Tensor]:
        """On rank 0 the CLIP's whole state dict in fp32 on the CPU, with averages in place of weights, elsewhere an
        empty dict. All ranks call."""
        state = {}
        for name, value in self.clip.named_parameters():
            whole = self.whole(name, getattr(value, "ds_shape", value.shape))
            if comm.is_rank0():
                state[name] = whole.to("cpu", copy=True)
        if comm.is_rank0():  # statistics of batch norm are averages already
            buffers = {name: value for name, value in self.clip.state_dict().items() if name not in self.parts}
            state |= {name: value.to("cpu", copy=True) for name, value in buffers.items()}
        return state

    def load(self, path: Path) -> None:
        """Take the averages of a file that was made of `state`, by any number of ranks."""
        saved = load_file(path)
        for name, part in self.parts.items():
            whole, size = saved[name].flatten(), len(part)
            mine = whole[comm.rank() * size :][:size]
            part.zero_()[: len(mine)] = mine

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages as its weights within the block. All ranks call."""
        before = {}
        self.engine.empty_partition_cache()  # ZeRO-3 keeps whole weights after a forward pass without gradients
        try:
            for name, value in self.clip.named_parameters():
                place = getattr(value, "ds_tensor", value).data
                before[name] = place.clone()
                place.copy_(self.parts[name] if hasattr(value, "ds_tensor") else self.whole(name, value.shape))
            yield
        finally:
            self.engine.empty_partition_cache()
            for name, value in self.clip.named_parameters():
                if name in before:
                    getattr(value, "ds_tensor", value).data.copy_(before[name])


def weights_of(checkpoint: Path) -> Path:
    """The file of a checkpoint with the weights that are evaluated and exported: the average where there is one."""
    average = checkpoint / NAME
    return average if average.exists() else checkpoint / "model.safetensors"
