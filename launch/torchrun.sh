#!/usr/bin/env bash
# Train on this node with every GPU, or with PROCESSES processes.
#   launch/torchrun.sh configs/cc3m_rn50.yaml run.dir=runs/cc3m
# On several nodes run it on each, with NODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$(( gpus > 0 ? gpus : 1 ))}
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$processes" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m pipeline.cli train "$@"
