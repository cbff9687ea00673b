#!/usr/bin/env bash
# The example of pipeline/audit/README.md: emoji with known poison and without, SafeCLIP on both, and what an audit
# finds in each.
# Writes runs/audit/{poisoned,clean}_audit/report.html and, where Chromium is installed, pictures of them beside it.
# What is finished is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
. launch/train_run.sh
install ""
prepare emoji 0
for data in poisoned clean; do
    run=runs/audit/$data overlay=data/emoji_attack_seed0
    [ "$data" = poisoned ] || overlay=null
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} safeclip train configs/emoji.yaml run.dir="$run" data.overlay="$overlay" \
        evaluation.every=0
    safeclip score --model "$run" --out "${run}_scores"
    safeclip audit "$run" --scores "${run}_scores" --out "${run}_audit"
done
python -m tests.benchmarks.audit_emoji runs/audit
if command -v chromium >/dev/null; then
    python -m tests.helpers.browser runs/audit/poisoned_audit/report.html runs/audit/report.png --height 1500
    python -m tests.helpers.browser runs/audit/clean_audit/report.html runs/audit/suspects.png --height 900 \
        --scheme dark --at gallery
fi
