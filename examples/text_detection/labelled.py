"""Labelled pictures on disk: one data set for the three formats, each of which has its module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .coco import read_coco
from .errors import UserError
from .grid import Grid
from .icdar import read_icdar
from .scene import Label, Scene, picture_size, read_picture
from .synthtext import read_synthtext

_COUNTED = 1000  # pictures whose words `lost_words` counts


class LabelledPictures(Dataset[Scene]):
    """The scenes of a data set on disk; a picture is read when it is asked for.

    source: a folder with SynthText's `gt.mat`, with a COCO-style JSON file, or with pictures and
        ICDAR's text files; or such a `.mat` or `.json` file itself.
    length: take only the first so many scenes.

    The boxes of all scenes lie in one array and the words in one string, so that loader processes
    share them instead of each copying millions of small ones. Boxes wholly outside their picture,
    of which SynthText has some, are dropped; those that reach over its border stay as they are. A
    scene whose picture is not there is left out with a warning.

    UserError: `source` is none of these, its labels are damaged, or none of its pictures can be
        read.
    """

    def __init__(self, source: Path, length: int | None = None) -> None:
        labels = read_labels(Path(source))[:length]
        require_one(f"the {len(labels)} pictures of {source}", [label.path for label in labels])
        there = [label for label in labels if label.path.is_file()]
        if len(there) < len(labels):
            missing = next(label.path for label in labels if not label.path.is_file())
            warnings.warn(
                f"{len(labels) - len(there)} of the {len(labels)} pictures of {source} are not "
                f"there and are left out: no {missing}, ...",
                stacklevel=2,
            )
            labels = there
        quads = np.concatenate([label.quads for label in labels])
        if len(quads) and np.median(np.ptp(quads, axis=1).max(axis=1)) < 2:
            raise UserError(
                f"most boxes of {source} are smaller than 2 pixels: are they in pixels?"
            )
        self._paths = _Strings([str(label.path) for label in labels])
        self._ends = np.cumsum([len(label.quads) for label in labels])
        self._quads = quads
        self._words = _Strings(["\n".join(label.words) for label in labels])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Scene:
        return self._scene(index, read_picture(self.path(index)))

    def without_pixels(self, index: int) -> Scene:
        """The scene with a picture (H, W, 0): only the head of its file is read."""
        width, height = picture_size(self.path(index))
        return self._scene(index, np.empty((height, width, 0), np.uint8))

    def path(self, index: int) -> Path:
        """The file of a picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of a set of {len(self)}")
        return Path(self._paths[index])

    def _scene(self, index: int, picture: np.ndarray) -> Scene:
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        quads = self._quads[start:end]
        words = self._words[index].split("\n")[: len(quads)]  # without words it is one empty string
        return Scene(picture, quads, tuple(words)).inside()


class _Strings:
    """A sequence of strings in one object."""

    def __init__(self, strings: list[str]) -> None:
        encoded = [text.encode(errors="surrogateescape") for text in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        part = self._bytes[self._ends[index] : self._ends[index + 1]]
        return part.decode(errors="surrogateescape")


def require_one(what: str, paths: Sequence[Path]) -> None:
    """UserError where no picture can be read: none is there, or they are pointers of Git LFS."""
    reason = None
    for path in paths:
        try:
            picture_size(path)
        except UserError as error:
            reason = reason or error
        else:
            return
    raise UserError(f"not one of {what} can be read: {reason}")


def read_labels(source: Path) -> list[Label]:
    """The labels of a data set in the format that is found there; at least one, or UserError."""
    if source.suffix.lower() == ".mat" or (source / "gt.mat").exists():
        labels = read_synthtext(source / "gt.mat" if source.is_dir() else source)
    elif not source.exists():
        raise UserError(f"there is no file or folder {source}")
    else:
        labels = read_coco(source) or read_icdar(source)
    if not labels:
        raise UserError(
            f"{source} has neither SynthText's gt.mat, nor a COCO-style .json file, nor pictures "
            "with ICDAR's text files (gt_NAME.txt or NAME.txt for the picture NAME)"
        )
    return labels


def lost_words(scenes: LabelledPictures, grid: Grid) -> tuple[int, int, int]:
    """How many words stretching to the grid's size makes too low to read, of how many.

    Only words that are readable in their pictures count, those of at most 1,000 pictures; the
    third number is that of the pictures.
    """
    lost = readable = 0
    pictures = min(len(scenes), _COUNTED)
    for index in np.linspace(0, len(scenes) - 1, pictures).astype(int):
        try:
            scene = scenes.without_pixels(index)
        except UserError:
            continue  # training names it
        height, width = scene.picture.shape[:2]
        before = grid.wanted(scene)
        stretched = scene.quads * np.float32([grid.width / width, grid.height / height])
        lost += int((before & ~grid.readable(stretched, grid.width, grid.height)).sum())
        readable += int(before.sum())
    return lost, readable, pictures
