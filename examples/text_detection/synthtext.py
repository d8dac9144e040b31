"""The labels of the SynthText data set, and a writer of the same format.

A folder holds `gt.mat` and pictures. `gt.mat` has cell arrays of 1 x N, of which these are used:
`imnames`, paths in the folder; `wordBB`, 2 x 4 x n, the x and y of the four corners of each of n
words, clockwise from the top left, and 2 x 4 where a picture has one word; `txt`, text instances,
whose lines end with a line feed and whose words are parted by white space. `charBB`, the boxes of
letters, is neither read nor written. Source: the data set's readme.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from .errors import UserError
from .files import make_folder
from .scene import Label, Scene

_COLUMNS = ("imnames", "wordBB", "txt")


def read_synthtext(path: Path) -> list[Label]:
    """The labels in the file `gt.mat`; UserError where it is not SynthText's.

    Names may be padded with blanks and have backslashes. Where the number of words is not that
    of the boxes, the words are empty: the boxes are still good.
    """
    labels = []
    for index, (name, box, text) in enumerate(zip(*_read_columns(path), strict=True)):
        picture = path.parent / "".join(map(str, np.ravel(name))).strip().replace("\\", "/")
        quads = _quads(box, path, index)
        words = " ".join(map(str, np.ravel(text))).split()
        if len(words) != len(quads):
            words = [""] * len(quads)
        labels.append(Label(picture, quads, tuple(words)))
    return labels


def write_synthtext(scenes: Iterable[Scene], folder: Path) -> None:
    """Write scenes as `gt.mat` and numbered PNG pictures; UserError if `folder` has a `gt.mat`."""
    if (folder / "gt.mat").exists():
        raise UserError(f"{folder / 'gt.mat'} exists already; name another folder or remove it")
    names, boxes, texts = [], [], []
    for index, scene in enumerate(scenes):
        name = f"{index // 1000}/{index:06d}.png"  # a thousand pictures a folder
        path = folder / name
        make_folder(path.parent)
        Image.fromarray(scene.picture).save(path)
        names.append(name)
        box = scene.quads.transpose(2, 1, 0)
        boxes.append(box[:, :, 0] if box.shape[2] == 1 else box)
        texts.append(np.array(scene.words))
    columns = zip(_COLUMNS, (names, boxes, texts), strict=True)
    scipy.io.savemat(folder / "gt.mat", {name: _cells(values) for name, values in columns})


def _cells(values: list[str] | list[NDArray[np.generic]]) -> NDArray[np.object_]:
    """A 1 x N cell array."""
    cells = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        cells[0, index] = value
    return cells


def _read_columns(path: Path) -> list[NDArray[np.object_]]:
    """The three columns of `gt.mat`, each (N,) objects."""
    if not path.is_file():
        raise UserError(
            f"there is no {path}; name the folder that holds SynthText's gt.mat, "
            "or write a set with make-data"
        )
    try:
        contents = scipy.io.loadmat(path, variable_names=_COLUMNS)
    except Exception as error:  # scipy raises many kinds for a file that is no MAT file
        raise UserError(f"cannot read {path} as a MATLAB file: {error}") from None
    missing = [name for name in _COLUMNS if name not in contents]
    if missing:
        raise UserError(f"{path} is not SynthText's: it has no {' and no '.join(missing)}")
    columns = [np.ravel(contents[name]) for name in _COLUMNS]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(
            f"{len(column)} {name}" for name, column in zip(_COLUMNS, columns, strict=True)
        )
        raise UserError(f"{path} is not SynthText's: it has {counts}, not one of each a picture")
    if not len(columns[0]):
        raise UserError(f"{path} lists no pictures")
    return columns


def _quads(box: NDArray[np.floating], path: Path, index: int) -> NDArray[np.float32]:
    """One cell of `wordBB` as (n, 4, 2)."""
    if box.ndim == 2 and box.shape == (2, 4):
        box = box[:, :, None]
    if not box.size:
        return np.empty((0, 4, 2), np.float32)
    if box.ndim != 3 or box.shape[:2] != (2, 4):
        raise UserError(
            f"{path} is not SynthText's: wordBB of picture {index} has the shape "
            f"{' x '.join(map(str, box.shape))}, not 2 x 4 x n"
        )
    return np.ascontiguousarray(box.transpose(2, 1, 0), np.float32)
