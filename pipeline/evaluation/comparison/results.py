"""The results file: a line of JSON for each cell, appended when it is done. What has a line is not run again."""

import json
import os
from pathlib import Path

from shards.errors import UserError

Kind = type | tuple | dict | list | None  # of a value, as in ROW
NUMBER = (int, float)
RECALLS = {"r1": NUMBER, "r5": NUMBER, "r10": NUMBER}
ROUNDS = {"recall": [NUMBER], "auroc": [(*NUMBER, None)], "fpr_at_full_recall": [(*NUMBER, None)]}
ATTACK = {"success": NUMBER, "count": int, "base": (*NUMBER, None), "true_class": NUMBER}
# What the tables need of a row: types; a tuple names several, None is null. A row may have more.
ROW: dict[str, Kind] = {
    **dict.fromkeys(("cell", "set", "group", "defence"), str),
    **dict.fromkeys(("clean_top1", "clean_top5", "seconds", "seconds_before", "seconds_own", "sample_views"), NUMBER),
    **dict.fromkeys(("linear_probe", "poison_trained_on"), (*NUMBER, None)),
    **dict.fromkeys(("commit", "setup", "attack", "recipe"), (str, None)),  # None in rows written before they were kept
    "seed": int,
    "poisoned": bool,
    "retrieval": ({"image_to_text": RECALLS, "text_to_image": RECALLS}, None),
    "rounds": ({**ROUNDS, "false_positives": [NUMBER]}, None),
}


def read_results(path: str | Path) -> list[dict]:
    """Its rows, [] without a file; of rows with the same key the last, where it stands. Raises UserError where a
    line is no row."""
    path = Path(path)
    rows: dict[str, dict] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line.decode())
            wrong = fault(row)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise UserError(f"results {path}: line {number} is no row of a comparison ({wrong}); mend or delete it")
        rows.pop(row["cell"], None)
        rows[row["cell"]] = row
    return list(rows.values())


def fault(row: dict) -> str | None:
    """What is wrong with a row in one phrase, or None."""
    if not fits(row, {"attacks": {}}):
        return "it has no attacks"
    wrong = [key for key, kind in ROW.items() if not fits(row.get(key), kind)]
    wrong += [f"attacks.{name}" for name, attack in row["attacks"].items() if not fits(attack, ATTACK)]
    return f"missing or of a wrong type: {', '.join(wrong)}" if wrong else None


def fits(value: object, kind: Kind) -> bool:
    """Whether a value is of a kind."""
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(key), of) for key, of in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    return value is None if kind is None else isinstance(value, kind)


def append_result(path: str | Path, row: dict) -> None:
    """Add a row: one write, on disk before this returns, so that a call that is cut off leaves whole lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)
