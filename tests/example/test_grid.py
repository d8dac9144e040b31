"""The coding of word boxes: what lies in which cell, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.text_detection.grid import (
    IGNORE,
    Grid,
    pose_to_quad,
    quad_to_pose,
    warn_if_pixels,
)

strides = st.sampled_from([8, 16, 32])
poses = st.tuples(
    st.floats(40, 216),  # x
    st.floats(40, 216),  # y
    st.floats(9, 70),  # w
    st.floats(9, 25),  # h
    st.floats(-np.pi, np.pi),  # theta
)


def quad(x: float, y: float, w: float = 30, h: float = 12, theta: float = 0) -> np.ndarray:
    return pose_to_quad(np.array([[x, y, w, h, theta]], np.float32))


@given(poses, strides)
def test_a_rectangle_survives_coding_within_half_a_pixel(pose: tuple, stride: int) -> None:
    grid = Grid(stride)
    there = quad(*pose)
    coded = grid.encode(there, 256, 256)
    assert coded.target.shape == (7, 256 // stride, 256 // stride)
    assert (coded.target[6] == 1).sum() == 1
    back = grid.decode(coded.target).quads
    assert np.abs(back - there).max() < 0.5
    assert np.abs(back - there).max() < 1e-2  # in fact


@given(poses, st.lists(st.floats(-1.5, 1.5), min_size=8, max_size=8))
def test_a_quad_in_perspective_comes_back_as_its_rectangle(pose: tuple, moves: list) -> None:
    """The corners are off by no more than the quad's own departure from a rectangle."""
    there = quad(*pose) + np.array(moves, np.float32).reshape(1, 4, 2)
    rectangle = pose_to_quad(quad_to_pose(there))
    grid = Grid(min_height=0)
    back = grid.decode(grid.encode(there, 256, 256).target).quads
    assert np.abs(back - rectangle).max() < 1e-2
    assert np.abs(back - there).max() < 6  # corners moved by up to 2.1 pixels each


@given(poses)
def test_targets_are_in_units_of_the_grid(pose: tuple) -> None:
    target = Grid(16).encode(quad(*pose), 256, 256).target
    dx, dy, w, h, cosine, sine, _ = target[:, target[6] == 1][:, 0]
    assert -0.5 <= dx < 0.5
    assert -0.5 <= dy < 0.5
    assert w == pytest.approx(pose[2] / 256, rel=1e-4)
    assert h == pytest.approx(pose[3] / 256, rel=1e-4)
    assert cosine == pytest.approx(np.cos(pose[4]), abs=1e-4)  # radians
    assert sine == pytest.approx(np.sin(pose[4]), abs=1e-4)


def test_rows_are_y_and_columns_are_x() -> None:
    target = Grid(16).encode(quad(200, 40), 256, 128).target
    assert target.shape == (7, 8, 16)
    assert np.argwhere(target[6] == 1).tolist() == [[40 // 16, 200 // 16]]


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_cells_are_half_open(stride: int) -> None:
    """A centre on a line belongs to the right and lower cell, and to that one only."""
    target = Grid(stride).encode(quad(128, 64), 256, 256).target
    assert np.argwhere(target[6] == 1).tolist() == [[64 // stride, 128 // stride]]
    assert target[:2, 64 // stride, 128 // stride].tolist() == [-0.5, -0.5]


def test_of_two_words_in_a_cell_the_larger_is_kept_and_the_other_counted() -> None:
    words = np.concatenate([quad(100, 100, 20, 10), quad(105, 105, 40, 12), quad(98, 99, 12, 9)])
    coded = Grid(16).encode(words, 256, 256)
    assert coded.collisions == 2
    assert coded.target[2, 6, 6] == pytest.approx(40 / 256)
    assert Grid(8).encode(words[:2], 256, 256).collisions == 0  # finer cells part them


def test_of_equal_words_in_a_cell_the_first_is_kept() -> None:
    words = np.concatenate([quad(100, 100), quad(105, 105)])
    coded = Grid(16).encode(words, 256, 256)
    assert coded.collisions == 1
    assert coded.target[0, 6, 6] == pytest.approx(100 / 16 - 6.5)


def test_a_word_centred_outside_is_left_out() -> None:
    coded = Grid(16).encode(np.concatenate([quad(300, 100), quad(-40, 10)]), 256, 256)
    assert not coded.target.any()


def test_an_unreadable_word_makes_its_cells_ignored() -> None:
    low = quad(104, 104, 40, 4)  # 4 pixels high: too small
    target = Grid(16).encode(low, 256, 256).target
    assert np.argwhere(target[6] == IGNORE).tolist() == [[6, 5], [6, 6], [6, 7]]
    assert not target[:6].any()

    cut = quad(4, 104, 60, 16)  # reaches over the left border
    target = Grid(16).encode(cut, 256, 256).target
    assert (target[6, 6, :2] == IGNORE).all()
    assert (target[6] == 1).sum() == 0


def test_a_readable_word_outranks_an_ignored_cell() -> None:
    words = np.concatenate([quad(104, 104, 60, 5), quad(104, 104, 30, 12)])
    target = Grid(16).encode(words, 256, 256).target
    assert target[6, 6, 6] == 1
    assert (target[6] == IGNORE).any()


def test_no_words_are_no_problem() -> None:
    coded = Grid().encode(np.empty((0, 4, 2), np.float32), 256, 256)
    assert not coded.target.any()
    assert len(Grid().decode(coded.target)) == 0


def test_a_picture_with_a_broken_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="250 x 256 pixels has no whole number of cells"):
        Grid().encode(quad(100, 100), 250, 256)


def test_targets_in_pixels_are_warned_of() -> None:
    target = Grid().encode(quad(100, 100), 256, 256).target
    warn_if_pixels(target)  # silent: pytest would show it below
    pixels = target * np.array([16, 16, 256, 256, 1, 1, 1], np.float32)[:, None, None]
    with pytest.warns(UserWarning, match="look like pixels"):
        warn_if_pixels(np.stack([pixels, pixels]))
