#!/usr/bin/env bash
# From nothing to a CLIP that was not poisoned: install, build the data, poison it, train plain CLIP and SafeCLIP with 2
# processes, evaluate both, print one table. Writes runs/quickstart/result.json and result.png. What is finished is used
# again; delete runs/quickstart to train anew. SEED=1 gives another seed, PRESETS="clip paper default" trains and
# evaluates the published recipe too.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
. launch/train_run.sh
. launch/gpus.sh
install ""
seed=${SEED:-0}
out=runs/quickstart
[ "$seed" = 0 ] || out=runs/quickstart_seed$seed
processes=2
if [ "$(gpus)" = 1 ]; then processes=1; fi
prepare shapes "$seed"
for preset in ${PRESETS:-clip default}; do
    train_run configs/quickstart.yaml shapes "$preset" "$seed" "$out" "$processes"
    evaluate_run "$preset" "$out"
done
safeclip compare "$out/clip" "$out/default" --out "$out"
