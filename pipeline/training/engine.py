"""The DeepSpeed engine: ZeRO 0 to 3 in fp32 or bf16, on GPUs or on the CPU."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training.model import MAX_LOG_SCALE, Towers, param_groups
from pipeline.training.reducer import Reducer, backward_order
from shards.errors import UserError

if TYPE_CHECKING:  # they take seconds, and a process sets them up first: import_deepspeed
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

Files = dict[str | Path, bytes | memoryview]  # what is to be written, by its path

BUCKET = 8_000_000  # gradients that are reduced at once, as many as DistributedDataParallel's 25 MiB of fp32 hold
# By ZeRO stage. At 1 and 2 DeepSpeed reduces with all-reduce anyway (use_multi_rank_bucket_allreduce); reduce_scatter
# makes it copy each bucket for that and back.
SETTINGS: dict[int, dict[str, int | bool]] = {
    0: {},
    1: {"reduce_bucket_size": BUCKET, "reduce_scatter": False},
    2: {"reduce_bucket_size": BUCKET, "reduce_scatter": False},
    3: {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0},
}


def stage_of_run(train: Train, world: int, state: Mapping | None) -> int:
    """ZeRO stage of a run of `world` processes. train.precision: fp32 or bf16; state: of the checkpoint from which it
    resumes, None of a new run.

    A single process has nothing to share out: in fp32, stages 1 to 3 would only copy its weights and gradients. A run
    that begins so stays at stage 0 when it resumes with more processes.
    """
    if state:
        return 0 if state.get("zero_stage") == 0 else train.zero_stage  # older states do not have it
    return 0 if world == 1 and train.precision == "fp32" else train.zero_stage


def start_engine(towers: Towers, train: Train, device: torch.device, universal: bool = False) -> DeepSpeedEngine:
    """DeepSpeed engine over `towers` with AdamW. The process group must be up.

    `universal`: it will load a checkpoint of another world size, converted by checkpoint.to_universal.
    """
    deepspeed = import_deepspeed()
    stage = train.zero_stage
    optimizer = torch.optim.AdamW(
        param_groups(towers, train.weight_decay), lr=train.lr, betas=train.betas, eps=train.eps, fused=True
    )
    config = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // comm.world(),
        "gradient_clipping": train.clip,  # DeepSpeed clips at 1.0 when this is absent
        "zero_optimization": {"stage": stage, **SETTINGS[stage]},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": train.precision == "bf16"},
        "communication_data_type": "fp32",  # of gradients, as with autocast; in bf16 each addition of a ring rounds
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(
        model=towers.to(device), optimizer=optimizer, config=config, dist_init_required=False
    )
    if stage == 0:  # DeepSpeed would copy all gradients into one buffer and back, after the backward pass
        engine.enable_backward_allreduce = comm.world() > 1
    if stage == 0 and comm.world() > 1:
        reducer = Reducer(backward_order(towers), BUCKET, engine.is_gradient_accumulation_boundary)
        engine.allreduce_gradients = reducer.finish
    if comm.world() > 1:
        comm.wait_long(engine.data_parallel_group)  # of the default's ranks, with torch's default timeout
    engine.checkpoint_engine = memory_writer()
    return engine


def import_deepspeed() -> ModuleType:
    """Import deepspeed without log output and compiler, for the accelerator of this process."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer torch renames; each warning comes once a rank and worker.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else the first start compiles it
    import_muon()
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return deepspeed


def import_muon() -> None:
    """Import DeepSpeed's Muon as ZeRO does, though it is not used, but without torch's compiler, which its functions
    are decorated with and which takes longer to import than DeepSpeed."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:  # an older DeepSpeed
        pass
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    """The learning rate of all parameters."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clamp_logit_scale(engine: DeepSpeedEngine) -> None:
    """Keep the logit scale in [1, 100] (its log in [0, ln 100]): the weight and the part of its fp32 master on this
    rank. With a logit bias it is free, as in SigLIP, whose published scales are above 100."""
    if engine.module.clip.logit_bias is not None:
        return
    scale = engine.module.clip.logit_scale
    if hasattr(scale, "ds_id"):  # ZeRO-3: both are partitioned; what is no part of the scale is padding
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        safe_set_local_fp32_param(scale, safe_get_local_fp32_param(scale).clamp(0, MAX_LOG_SCALE))
        scale.ds_tensor.clamp_(0, MAX_LOG_SCALE)
        return
    scale.clamp_(0, MAX_LOG_SCALE)
    if getattr(scale, "_hp_mapping", None) is not None:  # ZeRO-1 and 2: the rank that owns the master
        scale._hp_mapping.get_hp_fragment().clamp_(0, MAX_LOG_SCALE)
    groups = zip(getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", []))
    for weight, master in [pair for group in groups for pair in zip(*group)]:  # ZeRO-0 in bf16
        if weight is scale:
            master.clamp_(0, MAX_LOG_SCALE)


def step(engine: DeepSpeedEngine) -> bool:
    """One optimizer step. False where a gradient was infinite or no number: then no weight and no state of the
    optimizer has moved, on any rank.

    engine.gradient_norm: the norm of all gradients of the global batch, before clipping.
    DeepSpeed leaves such a step out by itself at stages 1 to 3 and in bf16, silently; a plain optimizer would take it.
    """
    if not hasattr(engine.optimizer, "overflow"):
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine.gradient_norm = torch.stack(torch._foreach_norm(gradients)).norm()
        if not engine.gradient_norm.isfinite():  # gradients are averaged: the same on every rank
            engine.optimizer.zero_grad()  # and no engine.step(), whose clipping fails without gradients
            return False
        engine.step()
        return True
    engine.step()
    engine.gradient_norm = engine.get_global_grad_norm()
    return not engine.optimizer.overflow


def memory_writer() -> CheckpointEngine:
    """A DeepSpeed checkpoint engine that keeps what it should write in `.files` (path -> bytes), for whoever writes it
    later."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class MemoryWriter(CheckpointEngine):
        def __init__(self) -> None:
            self.files: Files = {}

        def create(self, info: object) -> None:
            pass

        def save(self, state_dict: dict, path: str) -> None:
            buffer = io.BytesIO()
            torch.save(state_dict, buffer)
            self.files[path] = buffer.getbuffer()

        def load(self, path: str, map_location: torch.device | str | None = None) -> dict:
            # Weights and plain values, and the three classes that DeepSpeed puts beside them.
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: object) -> bool:
            return True

    return MemoryWriter()


def serialise(engine: DeepSpeedEngine, folder: Path | str) -> Files:
    """{path in `folder`: bytes} of this rank's weights and optimizer state, for `load`; nothing is written. All ranks
    call."""
    # No `latest` file: it is written before the others have finished (the run's own marker comes last).
    engine.save_checkpoint(str(Path(folder).parent), tag=Path(folder).name, save_latest=False)
    files, engine.checkpoint_engine.files = engine.checkpoint_engine.files, {}
    return files


def load(engine: DeepSpeedEngine, folder: Path | str) -> None:
    """Restore what `serialise` gave, from files in `folder`; all ranks call."""
    kept = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in engine.optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
    # The settings are those of the config, which may have changed. ZeRO-3 loads the universal form with those of the
    # first group in all groups, and with one step counter shared by all.
    for group, settings in zip(engine.optimizer.param_groups, kept):
        group.update(settings)
    for parameter, state in engine.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)
    if path is None:
        raise UserError(f"checkpoint {folder}: DeepSpeed cannot load it; delete it to resume from the one before")


def consolidated_state(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """On rank 0 the CLIP's whole state dict in fp32 on the CPU, elsewhere an empty dict; all ranks call."""
    import deepspeed

    state = {}
    parameters = dict(engine.module.clip.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        if comm.is_rank0():
            for name, value in engine.module.clip.state_dict().items():
                kind = value.dtype if not value.is_floating_point() else torch.float32
                state[name] = value.detach().to("cpu", kind, copy=True).contiguous()
    return state
