#!/usr/bin/env bash
# The tables of the README: three data sets (one under a second attack), six seeds, plain CLIP against SafeCLIP by the presets paper and default.
#   launch/reproduce.sh                 everything (over three hours on 2 cores); what is finished is used again
#   SETS=shapes SEEDS=0 PRESETS="clip default" launch/reproduce.sh
#   SETS="shapes_small_decoys shapes_small_variants" PRESETS="clip default" launch/reproduce.sh      attackers who know of marks
# One process a run, JOBS runs at a time (one a core, or one on GPUs).
# Writes runs/reproduce/SET/seedN/PRESET/eval.json and runs/reproduce/table.md.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
. launch/train_run.sh
install ""
if nvidia-smi -L >/dev/null 2>&1; then JOBS=${JOBS:-1}; fi
export JOBS=${JOBS:-$(nproc)}
export -f train_run train_unpoisoned
for set in ${SETS:-shapes shapes_small emoji shapes_small_wander}; do
    case "$set" in shapes_small*) data=shapes_small ;; *) data=$set ;; esac
    config=configs/$data.yaml
    [ "$data" != shapes ] || config=configs/quickstart.yaml
    for seed in ${SEEDS:-0 1 2 3 4 5}; do prepare "$set" "$seed"; done
    unpoisoned=$(echo runs/reproduce/$data/unpoisoned/seed{0,1,2})
    for run in $unpoisoned; do echo "$config $data $run"; done | xargs -P "$JOBS" -L 1 bash -euc 'train_unpoisoned "$@"' train_unpoisoned
    for preset in ${PRESETS:-clip default paper}; do
        for seed in ${SEEDS:-0 1 2 3 4 5}; do echo "$config $set $preset $seed runs/reproduce/$set/seed$seed 1"; done
    done | xargs -P "$JOBS" -L 1 bash -euc 'train_run "$@" 2> >(sed -u "s|^|$2 $3 seed $4: |" >&2)' train_run
    for seed in ${SEEDS:-0 1 2 3 4 5}; do
        for preset in ${PRESETS:-clip default paper}; do evaluate_run "$preset" "runs/reproduce/$set/seed$seed" $unpoisoned; done
    done
done
python -m pipeline.evaluation.table runs/reproduce | tee runs/reproduce/table.md
