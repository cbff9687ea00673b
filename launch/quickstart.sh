#!/usr/bin/env bash
# From nothing to a CLIP that was not poisoned: install, build the data, poison it, train plain CLIP and SafeCLIP with
# 2 processes, evaluate both, print one table. Writes runs/quickstart/result.json and result.png.
# What is finished is used again; delete runs/quickstart to train anew. SEED=1 gives another seed.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
install ""

seed=${SEED:-0}
out=runs/quickstart
[ "$seed" = 0 ] || out=runs/quickstart_seed$seed
. launch/train_pair.sh
train_pair configs/quickstart.yaml configs/attack_shapes.yaml shapes default "$seed" "$out"
