"""Precision, recall and F-measure at an overlap of one half."""

from __future__ import annotations

import numpy as np
import pytest

from examples.text_detection.grid import Boxes, pose_to_quad
from examples.text_detection.scoring import Score, score


def boxes(*poses: tuple[float, ...]) -> Boxes:
    """Boxes (x, y, w, h, theta), each surer than the next."""
    array = np.array(poses, np.float32).reshape(-1, 5)
    return Boxes(array, np.linspace(0.9, 0.5, len(array), dtype=np.float32))


WORDS = pose_to_quad(np.array([[50, 50, 40, 20, 0], [150, 50, 40, 20, 0.3]], np.float32))
READABLE = np.array([True, True])


def test_perfect_boxes_score_one() -> None:
    total = score(boxes((50, 50, 40, 20, 0), (150, 50, 40, 20, 0.3)), WORDS, READABLE)
    assert (total.precision, total.recall, total.f_measure) == (1, 1, 1)


@pytest.mark.parametrize(("shift", "hits"), [(13, 1), (14, 0)])
def test_the_overlap_must_exceed_one_half(shift: float, hits: int) -> None:
    """Moved by d of 40 pixels the overlap is (40 - d) / (40 + d): 27/53 and 26/54."""
    assert score(boxes((50 + shift, 50, 40, 20, 0)), WORDS, READABLE).hits == hits


def test_a_word_counts_once() -> None:
    total = score(boxes((50, 50, 40, 20, 0), (51, 50, 40, 20, 0)), WORDS, READABLE)
    assert total == Score(hits=1, detections=2, words=2)
    assert total.f_measure == pytest.approx(0.5)


def test_a_detection_on_an_unreadable_word_is_left_out() -> None:
    readable = np.array([True, False])
    total = score(boxes((50, 50, 40, 20, 0), (150, 50, 20, 10, 0.3)), WORDS, readable)
    assert total == Score(hits=1, detections=1, words=1)


def test_a_detection_beside_an_unreadable_word_counts() -> None:
    total = score(boxes((120, 120, 40, 20, 0)), WORDS, np.array([True, False]))
    assert total == Score(hits=0, detections=1, words=1)


def test_nothing_found_and_nothing_there() -> None:
    none = np.empty((0, 4, 2), np.float32)
    assert score(boxes(), WORDS, READABLE) == Score(0, 0, 2)
    assert score(boxes((5, 5, 4, 4, 0)), none, np.empty(0, bool)) == Score(0, 1, 0)
    assert score(boxes(), none, np.empty(0, bool)).f_measure == 0


def test_corners_in_a_twisted_order_are_still_a_word() -> None:
    twisted = WORDS[:1, [0, 1, 3, 2]]
    assert score(boxes((50, 50, 40, 20, 0)), twisted, np.array([True])).hits == 1


def test_scores_add_up_before_the_ratio_is_taken() -> None:
    total = Score(1, 1, 4) + Score(3, 4, 4)
    assert (total.precision, total.recall) == (4 / 5, 4 / 8)
