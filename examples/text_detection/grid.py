"""Word boxes to the network's target maps and back.

A grid of cells of `stride` x `stride` pixels lies over the picture. The cell that holds a
word's centre (x, y) describes that word by

    (x - u) / stride, (y - v) / stride, w / W, h / H, cos(theta), sin(theta), confidence

where (u, v) is the middle of the cell, w and h are the word's length and height, theta is the
direction in which it is read (radians, clockwise on the screen because y points down) and
(W, H) is the size of the *training* pictures: a fixed unit, so that a network fed with larger
pictures still means the same number of pixels. Source: Gupta et al., CVPR 2016, section 4.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .scene import Scene, uncut

IGNORE = -1.0
"""The confidence of a cell that says nothing; pass it to the loss as `ignore_value`."""


_FARTHEST = 1e6  # pixels; no side of a picture is longer


@dataclass(frozen=True)
class Coded:
    """A picture's boxes as maps.

    target: (7, H / stride, W / stride) float32. Confidence is 1 in a word's cell, IGNORE in the
        cells of words that nobody could be asked to find, else 0.
    collisions: words left out because a larger one has its centre in the same cell.
    """

    target: NDArray[np.float32]
    collisions: int


@dataclass(frozen=True)
class Boxes:
    """Rotated boxes with scores, in pixels and radians.

    poses: (n, 5) float32, x, y, w, h, theta of each box.
    scores: (n,) float32.
    """

    poses: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def quads(self) -> NDArray[np.float32]:
        """(n, 4, 2) float32, the corners clockwise from the top left of the word."""
        return pose_to_quad(self.poses)


@dataclass(frozen=True)
class Grid:
    """The coding of boxes for one network.

    stride: pixels from one cell to the next.
    width, height: the size W, H of the training pictures, in pixels.
    min_height: a word lower than this many pixels counts as unreadable.
    """

    stride: int = 16
    width: int = 256
    height: int = 256
    min_height: float = 8.0

    def encode(
        self,
        quads: NDArray[np.float32],
        width: int,
        height: int,
        legible: NDArray[np.bool_] | bool = True,
    ) -> Coded:
        """Code the words (n, 4, 2) of a picture of `width` x `height` pixels.

        Cells are half open: a centre on the line between two cells belongs to the right or the
        lower one. Of several readable words in a cell the one of the largest area is kept, the
        first of them if areas tie. Unreadable words make the cells whose middle they cover, and
        the cell of their own middle, IGNORE, except where a readable word is centred. Words that
        are not `legible`, (n,) or one value for all, are unreadable.
        """
        if width % self.stride or height % self.stride:
            raise ValueError(
                f"a picture of {width} x {height} pixels has no whole number of cells "
                f"of {self.stride} pixels"
            )
        rows, columns = height // self.stride, width // self.stride
        target = np.zeros((7, rows, columns), np.float32)
        poses = quad_to_pose(quads)
        readable = self.readable(quads, width, height) & legible
        self._ignore(target[6], quads[~readable])

        cells = np.floor(poses[:, :2] / self.stride).astype(int)  # (n, 2): column, row
        inside = ((cells >= 0) & (cells < [columns, rows])).all(axis=1)
        areas = poses[:, 2] * poses[:, 3]
        collisions = 0
        for word in sorted(np.flatnonzero(readable & inside), key=lambda word: -areas[word]):
            column, row = cells[word]
            if target[6, row, column] == 1.0:
                collisions += 1
                continue
            x, y, w, h, theta = poses[word]
            target[:, row, column] = (
                x / self.stride - (column + 0.5),
                y / self.stride - (row + 0.5),
                w / self.width,
                h / self.height,
                np.cos(theta),
                np.sin(theta),
                1.0,
            )
        return Coded(target, collisions)

    def decode(self, maps: NDArray[np.float32], threshold: float = 0.3) -> Boxes:
        """The boxes of all cells of `maps` (7, rows, columns) with confidence over `threshold`.

        Boxes that no picture can have, infinite ones among them, are left out.
        """
        row, column = np.nonzero(maps[6] > threshold)
        dx, dy, w, h, cosine, sine, score = maps[:, row, column].astype(np.float64)
        poses = np.stack(
            [
                (column + 0.5 + dx) * self.stride,
                (row + 0.5 + dy) * self.stride,
                # Nothing keeps a network from predicting a size below zero.
                np.maximum(w * self.width, 1.0),
                np.maximum(h * self.height, 1.0),
                np.arctan2(sine, cosine),
            ],
            axis=1,
        )
        possible = np.isfinite(score) & (np.abs(poses) < _FARTHEST).all(axis=1)
        return Boxes(poses[possible].astype(np.float32), score[possible].astype(np.float32))

    def readable(self, quads: NDArray[np.float32], width: int, height: int) -> NDArray[np.bool_]:
        """Which of the words (n, 4, 2) are high enough and, within a pixel, not cut: (n,)."""
        high_enough = quad_to_pose(quads)[:, 3] >= self.min_height
        return uncut(quads, width, height) & high_enough

    def wanted(self, scene: Scene) -> NDArray[np.bool_]:
        """Which words of a scene a detector is asked to find, (n,): readable and legible ones."""
        height, width = scene.picture.shape[:2]
        return self.readable(scene.quads, width, height) & scene.legible

    def _ignore(self, confidence: NDArray[np.float32], quads: NDArray[np.float32]) -> None:
        """Write IGNORE into the cells of `confidence` (rows, columns) that the words touch."""
        for quad in quads / self.stride:
            rows, columns = confidence.shape
            column, row = np.floor(quad.mean(axis=0)).astype(int)
            if 0 <= row < rows and 0 <= column < columns:
                confidence[row, column] = IGNORE
            # In units of cells, less a half: OpenCV puts the middle of the first pixel at 0.
            sixteenths = np.rint((quad - 0.5) * 16).astype(np.int32)
            covered = np.zeros(confidence.shape, np.uint8)
            cv2.fillConvexPoly(covered, sixteenths, 1, shift=4)
            confidence[covered == 1] = IGNORE


def quad_to_pose(quads: NDArray[np.float32]) -> NDArray[np.float32]:
    """Quads (n, 4, 2) to poses (n, 5): x, y, w, h in pixels, theta in radians, (-pi, pi].

    Exact for rectangles. Of a quad seen in perspective it keeps the mean of the corners, the
    direction and length of the line from the middle of its left to that of its right side, and
    the height that gives a rectangle of the same area.
    """
    quads = np.asarray(quads, np.float64).reshape(-1, 4, 2)
    centre = quads.mean(axis=1)
    along = (quads[:, 1] + quads[:, 2] - quads[:, 0] - quads[:, 3]) / 2
    diagonals = quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]
    area = np.abs(diagonals[0][:, 0] * diagonals[1][:, 1] - diagonals[0][:, 1] * diagonals[1][:, 0])
    length = np.hypot(along[:, 0], along[:, 1])
    height = area / 2 / np.maximum(length, 1e-6)
    theta = np.arctan2(along[:, 1], along[:, 0])
    return np.column_stack([centre, length, height, theta]).astype(np.float32)


def pose_to_quad(poses: NDArray[np.float32]) -> NDArray[np.float32]:
    """Poses (n, 5) to the corners (n, 4, 2) of their rectangles, clockwise from the top left."""
    x, y, w, h, theta = np.asarray(poses, np.float64).reshape(-1, 5).T
    along = np.stack([w * np.cos(theta), w * np.sin(theta)], axis=1)[:, None] / 2
    down = np.stack([-h * np.sin(theta), h * np.cos(theta)], axis=1)[:, None] / 2
    corners = np.concatenate([-along - down, along - down, along + down, -along + down], axis=1)
    return (np.stack([x, y], axis=1)[:, None] + corners).astype(np.float32)


def warn_if_pixels(target: NDArray[np.float32]) -> None:
    """Warn where the poses of targets (..., 7, H, W) look like pixels, not like units of the grid.

    A centre lies within half a cell of its cell's middle and a word is at most about as long as
    the picture, so normalised poses stay near 1. Targets in pixels cost a thousand times more.
    """
    poses = np.moveaxis(target, -3, 0)[:4, np.moveaxis(target, -3, 0)[6] > 0]
    if poses.size and np.abs(poses).max() > 4:
        warnings.warn(
            f"the targets reach {np.abs(poses).max():.0f}: poses look like pixels; code them in "
            "units of the cell (x, y) and of the picture (w, h), as Grid.encode does",
            stacklevel=2,
        )
