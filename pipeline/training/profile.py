"""A trace of ten steps by torch.profiler: RUN/profile (train.profile=1)."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.distributed import comm
from shards.storage.files import write_bytes

WAIT, WARM, STEPS, ROWS = 5, 3, 10, 25  # steps that are not traced, traced and dropped, and kept; lines of the table


class Profile:
    """Traces steps of rank 0: RUN/profile/trace.json.gz, for chrome://tracing or ui.perfetto.dev, and table.txt, the
    operations that take the most time. A start with too few steps writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool):
        self.folder, self.profiler = run_dir / "profile", None
        if enabled and comm.is_rank0():
            self.gpu = torch.cuda.is_available()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.gpu
            steps = schedule(wait=WAIT, warmup=WARM, active=STEPS, repeat=1)
            self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=self.write)
            self.profiler.start()
            self.left = WAIT + WARM + STEPS

    def step(self) -> None:
        """Call after each step."""
        if self.profiler:
            self.profiler.step()
            self.left -= 1
            if not self.left:
                self.profiler.stop()
                self.profiler = None

    def write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        key = "self_cuda_time_total" if self.gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        write_bytes(self.folder / "table.txt", (f"{STEPS} steps\n{table}\n").encode())
