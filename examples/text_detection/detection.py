"""Word boxes out of a picture: the network at several scales, then non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .errors import UserError
from .grid import Boxes, Grid

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Of the paper: words of all sizes come to a size that the network knows at one of them."""

_MOST_PIXELS = 2**27  # of a scaled picture: the first layer's maps then take 4 GiB


@torch.inference_mode()
def detect(
    model: nn.Module,
    grid: Grid,
    picture: NDArray[np.uint8],
    scales: Sequence[float] = SCALES,
    threshold: float = 0.3,
    overlap: float = 0.3,
) -> Boxes:
    """Find the words of one picture (H, W, 3) uint8 of any size.

    scales: the picture is looked at once for each.
    threshold: boxes of a lower confidence are dropped.
    overlap: of two boxes with a higher intersection over union the surer one is kept.

    Boxes are in pixels of `picture`, surest first. The model should be in eval mode.

    UserError: the picture is too large at one of the scales, or for the memory.
    """
    device = next(model.parameters()).device
    height, width = picture.shape[:2]
    poses, scores = [], []
    for scale in scales:
        if width * scale * height * scale > _MOST_PIXELS:
            raise UserError(
                f"{width} x {height} pixels at scale {scale:g} are more than {_MOST_PIXELS}"
            )
        size = max(1, round(width * scale)), max(1, round(height * scale))
        scaled = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale != 1 else picture
        tensor = torch.from_numpy(_padded(scaled, grid.stride)).permute(2, 0, 1)[None]
        try:
            maps = model(tensor.to(device))[0].float().cpu().numpy()
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise UserError(f"no memory for {width} x {height} pixels at scale {scale:g}") from None
        boxes = grid.decode(maps, threshold)
        # Rounding the size makes the two directions' scales differ a little.
        ratio = np.array([width / size[0], height / size[1]], np.float32)
        poses.append(boxes.poses * np.array([*ratio, *ratio, 1], np.float32))
        scores.append(boxes.scores)
    return suppress(Boxes(np.concatenate(poses), np.concatenate(scores)), overlap)


def suppress(boxes: Boxes, overlap: float = 0.3) -> Boxes:
    """Rotated non-maximum suppression by OpenCV; what is left is sorted by score."""
    rotated = [
        ((float(x), float(y)), (float(w), float(h)), float(np.degrees(theta)))
        for x, y, w, h, theta in boxes.poses
    ]
    if not rotated:
        return boxes
    kept = cv2.dnn.NMSBoxesRotated(rotated, boxes.scores.tolist(), 0.0, overlap)
    kept = np.asarray(kept, int).reshape(-1)
    return Boxes(boxes.poses[kept], boxes.scores[kept])


def _padded(picture: NDArray[np.uint8], stride: int) -> NDArray[np.uint8]:
    """The picture continued by its border to whole cells at the right and below."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, -height % stride), (0, -width % stride), (0, 0)), mode="edge")
