"""Scenes of words drawn on photographs, with the exact box of every word.

Everything about picture i of a set follows from the seed, the split and i, so a set needs no
storage, any worker can make any picture, and two runs see the same ones (with the same fonts
installed).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from .materials import Split, fonts, photographs, words
from .scene import Scene

_RENDER_HEIGHT = 48  # pixels of font size a word is drawn at before it is warped into the picture
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in OpenCV


@dataclass(frozen=True)
class Style:
    """What the generated pictures look like; ranges are inclusive (low, high).

    words: number of words tried per picture; one that finds no free place is left out.
    height: of a word's tight box, in pixels of the finished picture.
    rotation: the largest angle from the horizontal, in radians, to either side.
    perspective: how far a corner may move, as a share of the word's height.
    cut: share of words placed without regard to the border, which may cut them.
    contrast: least difference of luminance between a word and its ground, of 255.
    blur: standard deviation of the final Gaussian blur, in pixels.
    noise: standard deviation of the final Gaussian noise, of 255.
    """

    words: tuple[int, int] = (2, 7)
    height: tuple[float, float] = (12.0, 40.0)
    rotation: float = np.pi / 6
    perspective: float = 0.12
    cut: float = 0.1
    contrast: float = 70.0
    blur: tuple[float, float] = (0.0, 0.9)
    noise: tuple[float, float] = (0.0, 8.0)


class GeneratedText(Dataset[Scene]):
    """A set of `length` generated scenes of size x size pixels, drawn when they are asked for."""

    def __init__(
        self,
        length: int,
        size: int = 256,
        split: Split = "train",
        seed: int = 0,
        style: Style | None = None,
    ) -> None:
        self.length = length
        self.size = size
        self.split: Split = split
        self.seed = seed
        self.style = style or Style()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of a set of {self.length}")
        random = np.random.default_rng([self.seed, self.split == "held-out", index])
        return draw_scene(random, self.size, self.split, self.style)


def draw_scene(random: np.random.Generator, size: int, split: Split, style: Style) -> Scene:
    """Draw one scene of size x size pixels with materials of `split`."""
    picture = _background(random, size, split)
    quads: list[NDArray[np.float32]] = []
    drawn: list[str] = []
    for _ in range(random.integers(style.words[0], style.words[1] + 1)):
        word = _cased(random, words(split)[random.integers(len(words(split)))])
        mask = _word_mask(word, fonts()[random.integers(len(fonts()))])
        quad = _free_quad(random, mask.shape[1] / mask.shape[0], quads, size, style)
        if quad is None:
            continue
        _paint(random, picture, mask, quad, style)
        quads.append(quad)
        drawn.append(word)
    picture = _photographed(random, picture, style)
    return Scene(picture, np.array(quads, np.float32).reshape(-1, 4, 2), tuple(drawn))


def _background(random: np.random.Generator, size: int, split: Split) -> NDArray[np.float32]:
    photograph = photographs(split)[random.integers(len(photographs(split)))]
    height, width = photograph.shape[:2]
    side = int(random.uniform(0.4, 1.0) * min(height, width))
    top = random.integers(height - side + 1)
    left = random.integers(width - side + 1)
    crop = photograph[top : top + side, left : left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    tint, shift = random.uniform(0.5, 1.4, 3), random.uniform(-30, 30)
    tinted = np.clip(np.arange(256)[:, None, None] * tint + shift, 0, 255)
    return cv2.LUT(crop, tinted.astype(np.float32))


def _cased(random: np.random.Generator, word: str) -> str:
    return (word, word.capitalize(), word.upper())[random.integers(3)]


@functools.lru_cache(maxsize=256)
def _font(file: Path) -> ImageFont.FreeTypeFont:
    # The basic layout is part of every Pillow, and faster.
    return ImageFont.truetype(file, _RENDER_HEIGHT, layout_engine=ImageFont.Layout.BASIC)


def _word_mask(word: str, file: Path) -> NDArray[np.uint8]:
    """The word's coverage (h, w) uint8, cut to its ink."""
    font = _font(file)
    left, top, right, bottom = font.getbbox(word)
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), word, fill=255, font=font)
    return np.array(canvas.crop(canvas.getbbox()))


def _free_quad(
    random: np.random.Generator,
    aspect: float,
    occupied: list[NDArray[np.float32]],
    size: int,
    style: Style,
) -> NDArray[np.float32] | None:
    """A place for a word of width / height `aspect`, (4, 2); None if ten tries find none free."""
    for _ in range(10):
        # Large words are rarer: the heights are uniform on a logarithmic scale.
        height = np.exp(random.uniform(*np.log(style.height)))
        width = aspect * height
        if width > 0.9 * size:
            continue
        angle = random.uniform(-style.rotation, style.rotation)
        cosine, sine = np.cos(angle), np.sin(angle)
        corners = 0.5 * np.array(
            [[-width, -height], [width, -height], [width, height], [-width, height]]
        )
        corners += random.uniform(-0.5, 0.5, (4, 2)) * style.perspective * height
        corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
        margin = np.zeros(2) if random.random() < style.cut else np.abs(corners).max(axis=0) + 1
        if (2 * margin >= size).any():
            continue
        quad = (corners + random.uniform(margin, size - margin)).astype(np.float32)
        around = _grown(quad)
        if not any(cv2.intersectConvexConvex(around, other)[0] for other in occupied):
            return quad
    return None


def _grown(quad: NDArray[np.float32]) -> NDArray[np.float32]:
    """The quad 20 % longer and higher about its middle, so that words keep a gap."""
    middle = quad.mean(axis=0)
    return middle + np.float32(1.2) * (quad - middle)


def _paint(
    random: np.random.Generator,
    picture: NDArray[np.float32],
    mask: NDArray[np.uint8],
    quad: NDArray[np.float32],
    style: Style,
) -> None:
    """Blend the word into `picture` in place, in a colour that stands out from its ground."""
    size = picture.shape[0]
    # Only the patch around the word is touched; its margin leaves room for the shadow.
    low = np.clip(np.floor(quad.min(axis=0)) - 4, 0, size - 1).astype(int)
    high = np.clip(np.ceil(quad.max(axis=0)) + 4, low + 1, size).astype(int)
    patch = picture[low[1] : high[1], low[0] : high[0]]

    height, width = mask.shape
    # Averaging before a strong reduction keeps thin strokes from breaking up.
    reduction = height / float(np.linalg.norm(quad[3] - quad[0]))
    if reduction > 1.5:
        mask = cv2.GaussianBlur(mask, (0, 0), 0.35 * reduction)
    # OpenCV puts the middle of the first pixel at 0, a Scene at 0.5.
    source = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) - 0.5
    homography = cv2.getPerspectiveTransform(source, (quad - low - 0.5).astype(np.float32))
    covered = cv2.warpPerspective(mask, homography, patch.shape[1::-1]) / np.float32(255)

    colour = _standing_out(random, patch, style.contrast)
    if random.random() < 0.2:  # a soft shadow or halo behind the word
        shade = cv2.GaussianBlur(covered, (0, 0), random.uniform(1.0, 2.0))
        patch += 0.7 * shade[..., None] * (255 - colour - patch)
    opacity = np.float32(random.uniform(0.85, 1.0))
    patch += opacity * covered[..., None] * (colour - patch)


def _standing_out(
    random: np.random.Generator, ground: NDArray[np.float32], contrast: float
) -> NDArray[np.float32]:
    """A colour (3,) that differs in luminance from its ground (h, w, 3).

    The difference from their mean is `contrast` and more where the ground is uneven.
    """
    mean, spread = cv2.meanStdDev(cv2.cvtColor(ground, cv2.COLOR_RGB2GRAY))
    # A ground of medium grey leaves 127 to either side; 110 keeps the search short.
    needed = min(contrast + spread.item(), 110.0)
    while True:
        colour = random.uniform(0, 255, 3).astype(np.float32)
        if abs(_LUMINANCE @ colour - mean.item()) >= needed:
            return colour


def _photographed(
    random: np.random.Generator, picture: NDArray[np.float32], style: Style
) -> NDArray[np.uint8]:
    """Blur and noise, as a lens and a sensor would add."""
    blur = random.uniform(*style.blur)
    if blur > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), blur)
    cv2.setRNGSeed(int(random.integers(2**31)))  # four times as fast as NumPy's normal numbers
    noise = cv2.randn(np.empty_like(picture), 0, random.uniform(*style.noise))
    return cv2.add(picture, noise, dtype=cv2.CV_8U)
