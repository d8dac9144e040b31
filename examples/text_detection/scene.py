"""A picture with its words' boxes: what every data source yields and every consumer takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import UserError

# Pillow's limit itself stands at twice the size from which it warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
"""How the names of picture files end, in lower case."""

ILLEGIBLE = "###"
"""The word of a box that nobody is asked to find ("do not care" in ICDAR's data sets)."""


class Label(NamedTuple):
    """A picture's file and its words, as in `Scene`."""

    path: Path
    quads: NDArray[np.float32]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """One labelled picture.

    picture: (H, W, 3) uint8, RGB.
    quads: (n, 4, 2) float32, the corners (x, y) of n words in pixels, clockwise as the word is
        read, from its top left. The picture covers [0, W) x [0, H): the middle of its first
        pixel is at (0.5, 0.5). A word may reach over the border.
    words: the n words themselves, ILLEGIBLE where a box is neither to be found nor a mistake.
    """

    picture: NDArray[np.uint8]
    quads: NDArray[np.float32]
    words: tuple[str, ...]

    @property
    def legible(self) -> NDArray[np.bool_]:
        """Which of the words are not marked as illegible: (n,)."""
        return np.array([word != ILLEGIBLE for word in self.words], bool)

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

    def cropped(self, left: int, top: int, side: int) -> Scene:
        """The square window at (left, top); where it reaches over the picture, its border goes on.

        Words that the picture's border cuts are ILLEGIBLE in the window.
        """
        height, width = self.picture.shape[:2]
        whole = uncut(self.quads, width, height)
        words = np.where(whole, np.array(self.words, object), ILLEGIBLE)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
        picture = cv2.copyMakeBorder(
            self.picture[y0:y1, x0:x1],
            y0 - top,
            top + side - y1,
            x0 - left,
            left + side - x1,
            cv2.BORDER_REPLICATE,
        )
        return Scene(picture, self.quads - np.float32([left, top]), tuple(words)).inside()

    def inside(self) -> Scene:
        """The scene without the words that lie wholly outside its picture."""
        height, width = self.picture.shape[:2]
        low, high = self.quads.min(axis=1), self.quads.max(axis=1)
        touching = ((high > 0) & (low < [width, height])).all(axis=1)
        words = np.array(self.words, object)[touching]
        return Scene(self.picture, self.quads[touching], tuple(words))


def uncut(quads: NDArray[np.float32], width: int, height: int) -> NDArray[np.bool_]:
    """Which of the words (n, 4, 2) lie, within a pixel, in a picture of this size: (n,)."""
    return ((quads >= -1) & (quads <= np.array([width, height]) + 1)).all(axis=(1, 2))


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture file as (H, W, 3) uint8 RGB, the way a viewer shows it.

    The picture is turned as EXIF says, and put on white where it is transparent. Grey of more than
    8 bits is scaled: from [0, 1], [0, 255] or [0, 65535], the first of them that holds all values
    (for integers [0, 65535]), or else from the least and the greatest finite value.

    UserError: it is missing, no picture, damaged, or larger than Pillow's limit of pixels.
    """
    with opened(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            picture = Image.fromarray(_eight_bits(np.array(picture)))
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of `read_picture(path)`, mostly from the head of the file."""
    with opened(path) as picture:
        if picture.format == "TIFF":
            picture.load()  # turns the picture
            return picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return picture.size[::-1] if turned else picture.size


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture file; every error is a UserError that names it."""
    try:
        with Image.open(path) as picture:
            if 0 in picture.size:
                raise ValueError("it has no pixels")
            yield picture
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except UnidentifiedImageError:
        raise UserError(
            f"cannot read {path}: it is no picture, or of a kind unknown here"
        ) from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the picture {path}: {reason}") from None


def _eight_bits(grey: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey (H, W) of any number type, scaled as `read_picture` says."""
    values = grey.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    whites = (1.0, 255.0, 65535.0) if grey.dtype.kind == "f" else (65535.0,)
    low, high = next(((0.0, white) for white in whites if low >= 0 and high <= white), (low, high))
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
