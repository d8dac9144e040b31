"""Files that hold what is right or are left as they were."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and the folders in it, also linked ones, by name; no hidden ones."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def make_folder(path: Path) -> Path:
    """`path`, made with its parents; UserError where it is a file or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    return path


def replace_file(path: Path, contents: bytes) -> None:
    """Write a file beside `path` and rename it, so that `path` is whole at any moment.

    UserError: it cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(contents)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(value: Any, path: Path) -> None:
    """Write `value`; numbers that JSON does not know, NaN and infinity, as text."""
    text = json.dumps(_known(value), indent=1, allow_nan=False)
    replace_file(path, (text + "\n").encode())


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
