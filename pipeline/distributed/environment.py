"""The environment variables by which a launcher (torchrun, srun, none) tells a process its rank and its GPU."""

import socket
from collections.abc import Mapping, MutableMapping

from shards.errors import UserError


def complete(env: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun does, where it is not the launcher.

    Raises UserError, naming the variable, where they are not those of a process group.
    """
    # Not SLURM_NTASKS, which is set in a batch script too, where only one process runs.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        if "MASTER_ADDR" not in env:
            raise UserError(
                "MASTER_ADDR: missing under srun; start with launch/slurm.sbatch, which takes it from scontrol"
            )
    if "RANK" not in env:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_PORT", "29500")
    check(env)


def check(env: Mapping[str, str]) -> None:
    """Raise UserError, naming the variable, unless the environment is one that a launcher makes for a process."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        value, of_number = env.get(name, ""), name != "MASTER_ADDR"
        if not value or of_number and not value.isdecimal():
            got, wanted = f"got {value!r}" if value else "missing", "a whole number" if of_number else "a host"
            raise UserError(
                f"{name}: {got}, expected {wanted}, as RANK is set; start with launch/torchrun.sh or "
                "launch/slurm.sbatch, or unset RANK to run one process"
            )
        numbers[name] = int(value) if of_number else 0
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        error = UserError(
            f"RANK: got {numbers['RANK']}, expected less than WORLD_SIZE, {numbers['WORLD_SIZE']}; number the "
            "processes from 0 on"
        )
        error.alone = True
        raise error


def own_gpu(local_rank: int, count: int, env: Mapping[str, str]) -> int:
    """Which of the `count` GPUs that this process sees is its own. Raises UserError where there are too few.

    A process that sees a single GPU was given it by SLURM (--gpus-per-task, --gpu-bind); torchrun shows all of the
    host's to each.
    """
    if count == 1 and "SLURM_PROCID" in env and "TORCHELASTIC_RUN_ID" not in env:
        return 0
    under_torchrun = "TORCHELASTIC_RUN_ID" in env  # which tells every process how many it starts here
    started = max(local_rank + 1, int(env.get("LOCAL_WORLD_SIZE") or 1) if under_torchrun else 1)
    if started > count:
        error = UserError(
            f"LOCAL_RANK: got {started - 1} on {socket.gethostname()}, where {count} GPU(s) can be seen; "
            "start no more processes a host than that "
            "(PROCESSES for launch/torchrun.sh, --nproc-per-node, --ntasks-per-node), "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
        error.alone = not under_torchrun  # of srun's tasks only those without a GPU meet it
        raise error
    return local_rank
