#!/usr/bin/env bash
# The table of defences: every set of configs/comparison.yaml, its attacks under every defence, three seeds. What has a
# row in tests/benchmarks/results.jsonl is not run again; an interrupted call resumes when it is given again.
#   launch/reproduce.sh                                                     everything: days on 2 cores
#   launch/reproduce.sh --sets photos --attacks a --defences none oracle --seeds 0
#   launch/reproduce.sh --sets photos --rates 25 50 100 200 400             how many poisoned pairs it takes
#   launch/reproduce.sh --report-only                                       tests/benchmarks/comparison.md and .png of
#                                                                           the rows that are there
#   launch/reproduce.sh --help                                              all options
# PYTHON_ENV=DIR, or an active virtual environment, is used in place of .venv, with what is installed there.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${PYTHON_ENV:-${VIRTUAL_ENV:-}}
if [ -n "$environment" ]; then
    export PATH="$environment/bin:$PATH"
else
    . launch/install.sh
    install ""
fi
exec python -m pipeline.evaluation.comparison "$@"
