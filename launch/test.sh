#!/usr/bin/env bash
# Install what the tests need and run them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
install test
ruff check pipeline shards tests
exec python -m pytest "$@"
