#!/usr/bin/env bash
# Train on this node with every GPU, or with PROCESSES processes.
#   launch/torchrun.sh configs/cc3m_rn50.yaml run.dir=runs/cc3m
#   NODES=4 MASTER_ADDR=node1 launch/torchrun.sh configs/cc3m_rn50.yaml run.dir=/shared/cc3m      on each of 4 nodes,
#                                                                                                 node1 being one
# When a process dies, all are started again, RESTARTS times at most (3), and resume from the last checkpoint.
# NODES=2:4 starts with 2 to 4 nodes, and continues with those that are left; their processes must divide the batch.
# SIGTERM or SIGUSR1 to this script: the run saves and stops, and the script ends with 75. The same command resumes.
# COMMAND=doctor checks instead of training. COMMAND=index, COMMAND="mask apply" and others prepare data (README.md).
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
[ ! -d "$here/.venv" ] || export PATH="$here/.venv/bin:$PATH"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"  # relative paths are those of the folder in which it is called
. "$here/launch/gpus.sh"
gpus=$(gpus)
processes=${PROCESSES:-$(( gpus > 0 ? gpus : 1 ))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Seconds in which a large model can be saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# The agents' store outlives a restart with the addresses of the processes that are gone, and a new process may read
# those: a new store each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
port=${MASTER_PORT:-29500}
meeting=(--rdzv-backend c10d --rdzv-id "$port" --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:$port")
[ "${NODES:-1}" != 1 ] || meeting=(--standalone)

export SAFECLIP_ENDS; SAFECLIP_ENDS=$(mktemp)  # how processes end that are not to be started again
trap 'rm -f "$SAFECLIP_ENDS"' EXIT

# torchrun, without its traceback when it is asked to stop.
python -c 'import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException:
    sys.exit(75)' --nnodes "${NODES:-1}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" "${meeting[@]}" \
    -m pipeline.cli ${COMMAND:-train} "$@" &
agent=$! stopped=
# The agent hands SIGTERM on to its processes and waits for them.
trap 'stopped=1; kill -TERM $agent 2>/dev/null || true' TERM USR1
code=0
wait $agent || code=$?
# A signal ends `wait` at once: wait for the agent itself.
while kill -0 $agent 2>/dev/null; do code=0; wait $agent || code=$?; done
[ -z "$stopped" ] || [ $code = 0 ] || exit 75
[ $code != 0 ] || code=$(tail -n 1 "$SAFECLIP_ENDS")
exit "${code:-0}"
