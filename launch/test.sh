#!/usr/bin/env bash
# Install what the tests need and run them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
install test
ruff check --quiet pipeline shards tests
ruff format --quiet --check pipeline shards tests
mypy
# Four files at a time on two cores: many tests start processes that wait for each other. In tests/conftest.py's order.
exec python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
