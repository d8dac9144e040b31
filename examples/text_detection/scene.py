"""A picture with its words' boxes: what every data source yields and every consumer takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import UserError


@dataclass(frozen=True)
class Scene:
    """One labelled picture.

    picture: (H, W, 3) uint8, RGB.
    quads: (n, 4, 2) float32, the corners (x, y) of n words in pixels, clockwise as the word is
        read, from its top left. The picture covers [0, W) x [0, H): the middle of its first
        pixel is at (0.5, 0.5). A word may reach over the border.
    words: the n words themselves.
    """

    picture: NDArray[np.uint8]
    quads: NDArray[np.float32]
    words: tuple[str, ...]

    def resized(self, width: int, height: int) -> Scene:
        """The same scene stretched to (height, width)."""
        old_height, old_width = self.picture.shape[:2]
        if (old_width, old_height) == (width, height):
            return self
        shrinks = width * height < old_width * old_height
        picture = cv2.resize(
            self.picture,
            (width, height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        scale = np.array([width / old_width, height / old_height], np.float32)
        return Scene(picture, self.quads * scale, self.words)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture file as (H, W, 3) uint8 RGB; UserError if it is missing or not a picture."""
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from None
