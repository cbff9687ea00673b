"""Figures of a run on rank 0: metrics.jsonl, Weights & Biases and TensorBoard if configured, and the progress line."""

import json
import logging
import math
import subprocess
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.config.schema import Config
from pipeline.distributed import comm
from shards.errors import UserError
from shards.storage.files import write_bytes

if TYPE_CHECKING:
    import wandb  # half a second, and only where it is used
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Appends to RUN/metrics.jsonl. length: bytes of it to keep; lines written after the checkpoint are removed."""

    def __init__(self, run_dir: Path, config: Config, length: int = 0):
        self.file, self.wandb, self.tensorboard, self.last = None, None, None, 0.0
        if not comm.is_rank0():
            return
        path = run_dir / "metrics.jsonl"
        self.file = open(path, "ab")
        keep_whole_lines(self.file, length)
        if config.wandb.mode != "disabled":
            import wandb

            earlier = map(json.loads, path.read_bytes().splitlines())
            self.rounds = [dict(flat(line)) for line in earlier if line.get("stage") == "selection"]
            id_file = run_dir / "wandb_id"  # kept, so that a resumed run is the same run there
            if not id_file.exists():
                write_bytes(id_file, uuid.uuid4().hex[:8].encode())
            try:
                self.wandb = wandb.init(
                    project=config.wandb.project,
                    mode=config.wandb.mode,
                    dir=str(run_dir),
                    id=id_file.read_text(),
                    name=config.wandb.name or run_dir.name,
                    tags=config.wandb.tags,
                    config={**config.model_dump(), "code": commit() or version("safeclip")},
                    resume="allow",
                    settings=wandb.Settings(silent=True),
                )
            except wandb.Error as error:  # nobody is logged in, or no network
                words = " ".join(str(error).split())
                raise UserError(
                    f"wandb.mode: {config.wandb.mode} fails here ({words}); run `wandb login`, or set it to offline"
                ) from None
        if config.tensorboard.enabled:
            self.tensorboard = tensorboard_writer(run_dir, path)

    def log(self, *, step: int, **figures: object) -> None:
        """Write one line: figures of one step, selection round or evaluation."""
        if not self.file:
            return
        figures = {"step": step, **figures}
        self.file.write((json.dumps(finite(figures)) + "\n").encode())
        self.file.flush()
        if self.tensorboard:
            for name, value in flat(figures):
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            shown: dict[str, Any] = {key: value for key, value in flat(figures) if isinstance(value, (int, float, str))}
            if figures.get("stage") == "selection":
                self.rounds.append(shown)
                shown["selection_rounds"] = table(self.rounds)
            self.wandb.log(shown, step=step)

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
        """Close metrics.jsonl, the run of Weights & Biases and TensorBoard's file, if they are open."""
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def finite(value: Any) -> Any:
    """A JSON value with null in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_whole_lines(file: BinaryIO, length: int) -> None:
    """Cut the file to its whole lines within the first `length` bytes; a crash of the host may have lost some."""
    kept = Path(file.name).read_bytes()[:length]
    if len(kept) < length:
        logger.warning(f"{file.name}: lines are lost: {len(kept):,} of {length:,} bytes are there")
    file.seek(file.truncate(kept.rfind(b"\n") + 1))  # `length` is asked for perhaps before the next line


def tensorboard_writer(run_dir: Path, metrics: Path) -> "SummaryWriter":
    """Writer of RUN/tensorboard. TensorBoard does not show what an earlier start wrote there for steps after those in
    `metrics`: they are done anew."""
    from torch.utils.tensorboard import SummaryWriter

    steps = [json.loads(line)["step"] for line in metrics.read_bytes().splitlines()[-1:]]
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps[0] + 1 if steps else 0)


def flat(figures: dict, where: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all figures; those of a mapping are named `a/b`."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{where}{key}/")
        else:
            yield where + key, value


def table(rounds: list[dict[str, Any]]) -> "wandb.Table":
    """A line for each selection round: its numbers."""
    import wandb

    numbers: list[Any] = [key for key in rounds[-1] if isinstance(rounds[-1][key], (int, float))]
    return wandb.Table(columns=numbers, data=[[line.get(key) for key in numbers] for line in rounds])


def commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # installed as a package, perhaps inside of another repository
        return None
    try:
        return subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None
