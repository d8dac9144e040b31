"""What the generator draws with: photographs, fonts and words, each from an installed package.

Training and held-out pictures share the fonts but neither photographs nor words, so that a
score on the held-out ones says something about pictures never seen.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import numpy as np
import skimage.data
from numpy.typing import NDArray
from skimage.color import gray2rgb
from wonderwords import RandomWord, filter_profanity

Split = Literal["train", "held-out"]

# The photographs and textures that lie inside scikit-image's own wheel: its other pictures are
# downloads. `page`, `text` and `clock` are left out because they hold writing without boxes.
_PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut",
        "brick",
        "camera",
        "cell",
        "coins",
        "grass",
        "hubble_deep_field",
        "immunohistochemistry",
        "moon",
        "retina",
        "stereo_motorcycle",
    ),
    "held-out": ("chelsea", "coffee", "gravel", "rocket"),
}
_SIDE = 512  # pixels; of a larger photograph much would be averaged away in every picture
_HELD_OUT_WORDS = 5  # every fifth word of the list


@functools.cache
def photographs(split: Split) -> tuple[NDArray[np.uint8], ...]:
    """The photographs of one split, each (H, W, 3) uint8 RGB, min(H, W) at most `_SIDE`."""
    pictures = []
    for name in _PHOTOGRAPHS[split]:
        loaded = getattr(skimage.data, name)()
        picture = loaded[0] if isinstance(loaded, tuple) else loaded  # a stereo pair: the left
        picture = picture if picture.ndim == 3 else gray2rgb(picture)
        scale = min(1.0, _SIDE / min(picture.shape[:2]))
        pictures.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return tuple(pictures)


@functools.cache
def fonts() -> tuple[Path, ...]:
    """Every font file at hand that can write Latin letters, in a fixed order.

    They are matplotlib's text fonts and those of all installed packages that declare an entry
    point in the group `fonts_ttf`, as the `font-*` packages on PyPI do.
    """
    bundled = Path(matplotlib.get_data_path(), "fonts", "ttf")
    text_fonts = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
    files = [file for pattern in text_fonts for file in bundled.glob(pattern)]
    files = [file for file in files if not file.stem.endswith("Display")]  # symbols only
    for package in entry_points(group="fonts_ttf"):
        files += [Path(file) for file in package.load().values()]
    return tuple(sorted(files, key=lambda file: (file.name, file)))


@functools.cache
def words(split: Split) -> tuple[str, ...]:
    """Lower-case English words of 3 to 10 letters, from the lists in `wonderwords`."""
    every = sorted(set(filter_profanity(RandomWord().filter(regex="[a-z]{3,10}"))))
    held_out = every[::_HELD_OUT_WORDS]
    return tuple(held_out if split == "held-out" else sorted(set(every) - set(held_out)))
