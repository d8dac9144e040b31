"""Figures: boxes on pictures, and a run's curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from .grid import Boxes
from .scene import Scene

FOUND = (255, 64, 0)
WORDS = (0, 200, 0)
_TILE = 640

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def draw_quads(
    picture: NDArray[np.uint8], quads: NDArray[np.float32], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """A copy of `picture` (H, W, 3) with the outlines of `quads` (n, 4, 2)."""
    drawn = picture.copy()
    # Sixteenths of a pixel, less half a pixel: OpenCV puts the middle of the first pixel at 0.
    sixteenths = np.rint((quads - 0.5) * 16).astype(np.int32)
    cv2.polylines(drawn, list(sixteenths), True, colour, 1, cv2.LINE_AA, shift=4)
    return drawn


def draw_boxes(
    picture: NDArray[np.uint8], quads: NDArray[np.float32], scores: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """A copy of `picture` with the outlines of `quads` (n, 4, 2) and their `scores` (n,)."""
    drawn = draw_quads(picture, quads, FOUND)
    for quad, score in zip(quads, scores, strict=True):
        x, y = np.rint(quad[0]).astype(int)
        place, font = (int(x), int(y) - 2), cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(drawn, f"{score:.2f}", place, font, 0.3, FOUND, 1, cv2.LINE_AA)
    return drawn


def save_detections(found: Sequence[tuple[Scene, Boxes]], path: Path, columns: int = 4) -> None:
    """Write a sheet of scenes, words outlined in green, detections in orange.

    All are stretched to the size of the first, at most `_TILE` pixels long.
    """
    height, width = found[0][0].picture.shape[:2]
    shrunk = min(1.0, _TILE / max(width, height))
    width, height = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    tiles = []
    for scene, boxes in found:
        tile = scene.resized(width, height)
        scale = np.float32([width, height]) / np.float32(scene.picture.shape[1::-1])
        drawn = draw_quads(tile.picture, tile.quads, WORDS)
        tiles.append(draw_boxes(drawn, boxes.quads * scale, boxes.scores))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    Image.fromarray(np.vstack(rows)).quantize(256).save(path, optimize=True)


def save_curves(
    log: dict[str, NDArray[np.float64]], path: Path, title: str = "", smooth: int = 1
) -> None:
    """Draw a run's log: the loss's parts, the negative weight and the F-measure over the steps.

    log: columns by name as `train` logs them; a cell without a value is NaN.
    smooth: each point of the loss is the mean of this many rows.
    """
    steps = log["step"]
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, weight, score = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    for name, label in (
        ("loss", "loss"),
        ("coord", "pose"),
        ("positive_conf", "confidence, positive cells"),
        ("negative_conf", "confidence, negative cells (weighted)"),
    ):
        values = np.convolve(log[name], np.full(smooth, 1 / smooth), mode="valid")
        loss.plot(steps[len(steps) - len(values) :], values, label=label, lw=1)
    loss.set(ylabel="loss", yscale="log", title=title)
    loss.legend()
    weight.plot(steps, log["negative_weight"], color="black", lw=1)
    weight.set(ylabel="negative weight", yscale="log")
    scored = ~np.isnan(log["f_measure"])
    for name, label in (("precision", "precision"), ("recall", "recall"), ("f_measure", "F")):
        score.plot(steps[scored], log[name][scored], marker="o", ms=3, lw=1, label=label)
    score.set(ylabel="held-out", xlabel="step", ylim=(0, 1))
    score.legend()
    figure.savefig(path, dpi=90)
