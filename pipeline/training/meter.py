"""Throughput of an epoch: samples/s, time spent waiting for data, memory, model FLOPs utilization, time left."""

import resource
import time

import torch

from pipeline.distributed import comm


class Meter:
    """Figures of the steps from `first` to `total`, counted from its making on.

    view_seconds: least seconds that all devices of the run together take for a view (flops.py), None if not known.
    """

    def __init__(self, total: int, first: int = 0, view_seconds: float | None = None):
        self.total, self.first, self.done, self.view_seconds = total, first, first, view_seconds
        self.samples, self.views, self.waited = 0, 0, 0.0
        self.started = time.monotonic()

    def step(self, samples: int, views: int = 1) -> None:
        """Count a step over `samples` pairs of all ranks, each in `views` views."""
        self.done, self.samples, self.views = self.done + 1, self.samples + samples, self.views + samples * views

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started)

    def figures(self) -> dict[str, float]:
        """{"samples_per_s", "samples_per_s_per_gpu": of each process, "data_wait": fraction of the time, "memory_gb",
        "mfu": model FLOPs utilization, where the device's peak is known (Chowdhery et al. 2022, PaLM, appendix B)}."""
        seconds = self.seconds
        found = {
            "samples_per_s": round(self.samples / seconds, 1),
            "samples_per_s_per_gpu": round(self.samples / seconds / comm.world(), 1),
            "data_wait": round(self.waited / seconds, 3),
            "memory_gb": round(memory_peak() / 1e9, 2),
        }
        if self.view_seconds:
            found["mfu"] = round(self.views * self.view_seconds / seconds, 3)
        return found

    def line(self, steps_left: int) -> str:
        """For the progress line; `steps_left` of the whole run."""
        figures, eta = self.figures(), self.seconds / max(1, self.done - self.first) * steps_left
        each = f" ({figures['samples_per_s_per_gpu']:.0f} a process)" if comm.world() > 1 else ""
        mfu = f"  MFU {figures['mfu']:.0%}" if "mfu" in figures else ""
        return (
            f"{figures['samples_per_s']:7.0f} samples/s{each}  data {figures['data_wait']:4.0%}{mfu}  "
            f"{figures['memory_gb']:.1f} GB  ETA {int(eta // 3600)}:{int(eta % 3600 // 60):02d}:{int(eta % 60):02d}"
        )


def memory_peak() -> int:
    """Most bytes so far: of tensors on this process's GPU, or on the CPU of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
