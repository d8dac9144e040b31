"""Precision, recall and F-measure of detected word boxes.

A detection is right if its intersection over union with a word's box is above 0.5; each word and
each detection counts once. Words that nobody could be asked to find (too small, cut off) are
neither missed nor found: a detection that lies on one by more than half of its own area is left
out, as in ICDAR 2015 with the words that it marks "do not care". Hits are summed over all pictures
before the ratios are taken. This is the matching by intersection over union that text detection
took over from Pascal VOC (described in arXiv 1907.01227, section 1); ICDAR 2013's own DetEval, with
its one-to-many matches by area, is not computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from .grid import Boxes


@dataclass(frozen=True)
class Score:
    """Counts over any number of pictures; `+` adds them up."""

    hits: int = 0
    detections: int = 0
    words: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.hits + other.hits, self.detections + other.detections, self.words + other.words
        )

    @property
    def precision(self) -> float:
        return self.hits / max(1, self.detections)

    @property
    def recall(self) -> float:
        return self.hits / max(1, self.words)

    @property
    def f_measure(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.hits / max(1, self.detections + self.words)

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f}, recall {self.recall:.3f}, "
            f"F-measure {self.f_measure:.3f} ({self.hits} hits, {self.detections} detections, "
            f"{self.words} words)"
        )


def score(
    found: Boxes,
    quads: NDArray[np.float32],
    readable: NDArray[np.bool_],
    overlap: float = 0.5,
) -> Score:
    """Score one picture's detections against its words (n, 4, 2), of which (n,) are readable.

    Detections that lie on unreadable words are left out first. The others choose in the order of
    their scores, each the free word that it covers best.
    """
    detected = _polygons(found.quads)
    words = _polygons(quads)
    common = shapely.area(shapely.intersection(detected[:, None], words[None, :]))  # (m, n)
    area = shapely.area(detected)[:, None]
    iou = common / np.maximum(area + shapely.area(words)[None, :] - common, 1e-9)
    on_unreadable = (common / np.maximum(area, 1e-9))[:, ~readable].max(axis=1, initial=0.0) > 0.5

    free = readable.copy()
    hits = 0
    for detection in np.argsort(-found.scores, kind="stable"):
        candidates = np.where(free, iou[detection], 0.0)
        if candidates.max(initial=0.0) > overlap and not on_unreadable[detection]:
            free[candidates.argmax()] = False
            hits += 1
    return Score(hits, int((~on_unreadable).sum()), int(readable.sum()))


def _polygons(quads: NDArray[np.float32]) -> NDArray[np.object_]:
    """(n,) polygons; the hull is valid also where the corners come in a twisted order."""
    count = len(quads)
    points = shapely.points(np.asarray(quads, np.float64).reshape(-1, 2)).reshape(count, 4)
    return np.atleast_1d(shapely.convex_hull(shapely.multipoints(points)))
