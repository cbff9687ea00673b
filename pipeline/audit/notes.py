"""Reasons of single pairs, such as why each cannot be read: a row and a number each, and every text once."""

from array import array
from functools import cached_property

import numpy as np


class Notes:
    """Rows with a reason each. Of a row that is added twice the last reason counts. Read it when all are added."""

    def __init__(self) -> None:
        self.rows, self.codes = array("q"), array("i")
        self.code: dict[str, int] = {}  # of a text, in the order of their coming

    def add(self, row: int, text: str) -> None:
        self.rows.append(row)
        self.codes.append(self.code.setdefault(text, len(self.code)))

    @cached_property
    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 rows, ascending; int32 numbers of their texts)."""
        row_M, code_M = np.frombuffer(self.rows, np.int64), np.frombuffer(self.codes, np.int32)
        order = np.argsort(row_M, kind="stable")
        row_M, code_M = row_M[order], code_M[order]
        last = np.diff(row_M, append=-1) != 0
        return row_M[last], code_M[last]

    @property
    def row_M(self) -> np.ndarray:
        """int64: the rows, ascending."""
        return self.sorted[0]

    def rows_of(self) -> dict[str, np.ndarray]:
        """{reason: its rows, ascending}."""
        row_M, code_M = self.sorted
        found = {text: row_M[code_M == code] for text, code in self.code.items()}
        return {text: rows for text, rows in found.items() if len(rows)}

    def get(self, row: int) -> str:
        """The reason of a row; "" if it has none."""
        row_M, code_M = self.sorted
        place = int(np.searchsorted(row_M, row))
        if place == len(row_M) or row_M[place] != row:
            return ""
        return self.texts[code_M[place]]

    @cached_property
    def texts(self) -> list[str]:
        return list(self.code)

    def __len__(self) -> int:
        return len(self.row_M)
