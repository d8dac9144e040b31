"""A run's log: a CSV file that a resumed run goes on with, and TensorBoard's if it is there."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import replace_file


class Log:
    """Rows of numbers by step, written as they come.

    path: of the CSV file; TensorBoard's events lie beside it, in the folder `tensorboard`.
    after: on resuming, the step of the checkpoint; rows of later steps, which will come again,
        are dropped, and so, with a warning, are rows that are damaged. None begins an empty file.
    """

    def __init__(self, path: Path, columns: Sequence[str], after: int | None = None) -> None:
        self.path = path
        self.columns = ("step", *columns)
        rows = []
        if after is not None and path.exists():
            _, rows, damaged = _read(path)
            rows = [row for row in rows if int(row["step"]) <= after]
            if damaged:
                warnings.warn(f"{damaged} damaged rows of {path} are left out", stacklevel=2)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, text.getvalue().encode())
        first = 0 if after is None else after + 1  # step; later events of a former run are void
        self.events = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(path.parent / "tensorboard", purge_step=first)
        except ImportError:
            pass
        except Exception as error:  # what a broken installation raises: the CSV file is enough
            warnings.warn(f"no log for TensorBoard: {error}", stacklevel=2)

    def add(self, step: int, **values: float) -> None:
        """Append a row; columns without a value stay empty."""
        row = {name: f"{value:.6g}" for name, value in values.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **row})
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a log by name; a cell without a value is NaN."""
    names, rows, _ = _read(path)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def _read(path: Path) -> tuple[list[str], list[dict[str, str]], int]:
    """The columns of a log, its whole rows, and how many are damaged; no cell has a quote."""
    head, *lines = path.read_text(errors="replace").splitlines() or [""]
    names = head.split(",")
    cells = [line.split(",") for line in lines]
    rows = [dict(zip(names, row, strict=True)) for row in cells if _whole(names, row)]
    return names, rows, len(lines) - len(rows)


def _whole(names: list[str], row: list[str]) -> bool:
    """Whether a row has a step, and a number or nothing in every other column."""
    try:
        int(row[0])
        for value in filter(None, row):
            float(value)
    except ValueError:
        return False
    return names[0] == "step" and len(row) == len(names)
