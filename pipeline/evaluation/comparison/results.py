"""The results file: a line of JSON for each cell, appended when it is done. What has a line is not run again."""

import json
import os
from pathlib import Path

from shards.errors import UserError


def read_results(path):
    """List of rows, [] without a file; of rows with the same key the last. Raises UserError where a line is no row."""
    path, rows = Path(path), {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["cell"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"results {path}: line {number} is no row of a comparison ({error}); mend or delete it"
            ) from None
    return list(rows.values())


def append_result(path, row):
    """Add a row: one write, on disk before this returns, so that a call that is cut off leaves whole lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)
