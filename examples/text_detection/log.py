"""A run's log: one CSV file that a resumed run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Log:
    """Rows of numbers by step, written as they come.

    after: on resuming, the step of the checkpoint; rows of later steps, which will come again,
        are dropped. None begins an empty file.
    """

    def __init__(self, path: Path, columns: Sequence[str], after: int | None = None) -> None:
        self.path = path
        self.columns = ("step", *columns)
        kept = []
        if after is not None and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= after]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, step: int, **values: float) -> None:
        """Append a row; columns without a value stay empty."""
        row = {name: f"{value:.6g}" for name, value in values.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **row})


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a log by name; a cell without a value is NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else ()
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
