"""Figures of a run: on rank 0 metrics.jsonl and Weights & Biases if configured, and the progress line."""

import json
import logging
import time
import uuid
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.distributed import comm
from shards.storage.files import write_bytes

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Appends to RUN/metrics.jsonl. length: bytes of it to keep; lines written after the checkpoint are removed."""

    def __init__(self, run_dir: Path, config: Config, length: int = 0):
        self.file, self.wandb, self.last = None, None, 0.0
        if not comm.is_rank0():
            return
        path = run_dir / "metrics.jsonl"
        self.file = open(path, "ab")
        self.file.truncate(length)
        if config.wandb.mode != "disabled":
            import wandb

            id_file = run_dir / "wandb_id"  # kept, so that a resumed run is the same run there
            if not id_file.exists():
                write_bytes(id_file, uuid.uuid4().hex[:8].encode())
            self.wandb = wandb.init(
                project=config.wandb.project,
                mode=config.wandb.mode,
                dir=str(run_dir),
                id=id_file.read_text(),
                name=run_dir.name,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )

    def log(self, *, step: int, **figures: object) -> None:
        """Write one line: figures of one step, selection round or evaluation."""
        if not self.file:
            return
        figures = {"step": step, **figures}
        self.file.write((json.dumps(figures) + "\n").encode())
        self.file.flush()
        if self.wandb:
            self.wandb.log(
                {key: value for key, value in figures.items() if isinstance(value, (int, float, str))}, step=step
            )

    def length(self) -> int:
        """Bytes written so far; part of the checkpoint."""
        return self.file.tell() if self.file else 0

    def progress(self, text: str, every: float = 5.0) -> None:
        """Log a line at most once in `every` seconds."""
        now = time.monotonic()
        if now - self.last >= every:
            self.last = now
            logger.info(text)

    def close(self) -> None:
        """Close metrics.jsonl and the run of Weights & Biases, if they are open."""
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


class Meter:
    """Throughput, fraction of the time spent waiting for data, and time left, of the steps from `first` to `total`."""

    def __init__(self, total: int, first: int = 0):
        self.total, self.first, self.done, self.samples, self.waited = total, first, first, 0, 0.0
        self.started = time.monotonic()

    def step(self, samples: int) -> None:
        self.done, self.samples = self.done + 1, self.samples + samples

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started)

    def figures(self) -> dict[str, float]:
        """{"samples_per_s", "data_wait": fraction of the time}."""
        return {
            "samples_per_s": round(self.samples / self.seconds, 1),
            "data_wait": round(self.waited / self.seconds, 3),
        }

    def line(self, steps_left: int) -> str:
        """For the progress line; `steps_left` of the whole run."""
        figures, eta = self.figures(), self.seconds / max(1, self.done - self.first) * steps_left
        return (
            f"{figures['samples_per_s']:7.0f} samples/s  data {figures['data_wait']:4.0%}  "
            f"ETA {int(eta // 3600)}:{int(eta % 3600 // 60):02d}:{int(eta % 60):02d}"
        )
