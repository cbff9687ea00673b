#!/usr/bin/env bash
# The tables of the README: shapes and emoji, seeds 0 1 2, plain CLIP against SafeCLIP by the presets paper and default.
#   launch/reproduce.sh                 everything (hours on 2 cores); what is finished is used again
#   SETS=shapes SEEDS=0 launch/reproduce.sh
# Writes runs/reproduce/SET/seedN/RUN/eval.json and runs/reproduce/table.md.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
install ""
. launch/train_pair.sh
for set in ${SETS:-shapes emoji}; do
    config=configs/quickstart.yaml
    [ "$set" = shapes ] || config=configs/$set.yaml
    for seed in ${SEEDS:-0 1 2}; do
        for preset in ${PRESETS:-default paper}; do
            train_pair "$config" "configs/attack_$set.yaml" "$set" "$preset" "$seed" "runs/reproduce/$set/seed$seed"
        done
    done
done
python -m pipeline.evaluation.table runs/reproduce | tee runs/reproduce/table.md
