"""From predicted maps to boxes: scales, padding, suppression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.text_detection.detection import detect, suppress
from examples.text_detection.grid import Boxes, Grid, pose_to_quad


class Oracle(nn.Module):
    """Says, whatever the size of the picture, that it holds one given word."""

    def __init__(self, pose: tuple[float, ...], width: int, height: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.pose = np.array([pose], np.float32)
        self.size = width, height

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        # What padding added at the right and below is at most a cell.
        scale = 2.0 ** np.round(np.log2(width / self.size[0]))
        pose = self.pose * np.array([scale] * 4 + [1], np.float32)
        target = Grid(min_height=0).encode(pose_to_quad(pose), width, height).target
        return torch.from_numpy(target)[None]


@pytest.mark.parametrize("size", [(256, 256), (250, 240), (400, 512)])
def test_every_scale_gives_the_box_in_pixels_of_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    pose = (120, 100, 90, 30, 0.4)
    picture = np.zeros((height, width, 3), np.uint8)
    for scale in (1.0, 0.5, 0.25):
        found = detect(Oracle(pose, width, height), Grid(), picture, [scale])
        assert len(found) == 1
        assert np.abs(found.poses[0, :4] - pose[:4]).max() < 1
        assert found.poses[0, 4] == pytest.approx(0.4, abs=1e-3)


def test_the_same_word_at_several_scales_is_one_box() -> None:
    pose = (120, 100, 90, 30, 0.4)
    picture = np.zeros((256, 256, 3), np.uint8)
    assert len(detect(Oracle(pose, 256, 256), Grid(), picture, [1.0, 0.5, 0.25])) == 1


def test_suppression_keeps_the_surest_and_sees_the_angle() -> None:
    poses = np.array(
        [
            [50, 50, 60, 8, 0],
            [50, 51, 60, 8, 0.02],  # the same word
            [50, 50, 60, 8, np.pi / 2],  # crosses it, another word
        ],
        np.float32,
    )
    kept = suppress(Boxes(poses, np.array([0.6, 0.9, 0.5], np.float32)))
    assert kept.scores.tolist() == pytest.approx([0.9, 0.5])
    assert kept.poses[0].tolist() == poses[1].tolist()


def test_no_boxes_are_no_problem() -> None:
    none = Boxes(np.empty((0, 5), np.float32), np.empty(0, np.float32))
    assert len(suppress(none)) == 0


def test_a_size_below_zero_becomes_a_pixel() -> None:
    maps = np.zeros((7, 2, 2), np.float32)
    maps[:, 0, 1] = 0, 0, -0.2, 0.1, 1, 0, 0.9
    assert Grid().decode(maps).poses[0].tolist() == pytest.approx([24, 8, 1, 25.6, 0])
