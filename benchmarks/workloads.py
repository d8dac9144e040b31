"""What is measured: grids, positive cells, dtypes, layouts, and the bytes each must move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NEGATIVE_WEIGHT = 0.01  # where the annealing starts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float64"] = torch.float64
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = ("clustered", "scattered")
SECTOR_BYTES = {"cpu": 64, "cuda": 32}  # a cache line; a sector, the least that DRAM delivers

FCRN_SIZES = ((16, 7, 16, 16), (16, 7, 32, 32))
DENSE_SIZES = ((16, 7, 128, 128), (64, 7, 128, 128), (64, 7, 256, 256))
HUGE_SIZE = (64, 7, 1024, 1024)
_CLUSTER = (8, 16)  # cells: a block of text, some lines high


class Pattern(NamedTuple):
    """Which cells are positive: a kind and a share in percent."""

    kind: str
    percent: float

    def __str__(self) -> str:
        if self.percent in (0, 100):
            return "none" if self.percent == 0 else "all"
        return f"{self.kind}:{self.percent:g}"


class Case(NamedTuple):
    """One input: its shape (B, C, H, W), its positive cells, its dtype, layout and thread count."""

    size: tuple[int, int, int, int]
    pattern: Pattern
    dtype: str
    layout: str
    threads: int  # of the CPU; on a GPU, those of the host

    @property
    def cells(self) -> int:
        """Number of cells, B * H * W."""
        return self.size[0] * self.size[2] * self.size[3]

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "size": list(self.size), "pattern": str(self.pattern)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Case:
        return Case(
            parse_size("x".join(map(str, fields["size"]))),
            parse_pattern(fields["pattern"]),
            fields["dtype"],
            fields["layout"],
            fields["threads"],
        )


class Inputs(NamedTuple):
    """What a loss is called with, and which cells are positive."""

    pred: Tensor  # (B, C, H, W), a leaf that requires grad
    target: Tensor  # (B, C, H, W)
    positive: np.ndarray  # (B, H * W) bool


def parse_size(text: str) -> tuple[int, int, int, int]:
    """`64x7x128x128` as (B, C, H, W).

    Raises:
        ValueError: not four positive numbers, or more than 1024 maps.
    """
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"a size is BxCxHxW, four positive numbers like 64x7x128x128, got {text!r}"
        )
    batch, maps, height, width = map(int, parts)
    return batch, maps, height, width


def parse_pattern(text: str) -> Pattern:
    """`clustered:2`, `scattered:10`, `none` or `all`; the number is a share in percent.

    Raises:
        ValueError: another word, or a share that is not between 0 and 100.
    """
    if text in ("none", "all"):
        return Pattern("scattered", 0.0 if text == "none" else 100.0)
    kind, _, share = text.partition(":")
    try:
        percent = float(share)
    except ValueError:
        percent = math.nan
    if kind not in KINDS or not 0 <= percent <= 100:
        raise ValueError(
            "a pattern is none, all, clustered:PERCENT or scattered:PERCENT "
            f"with 0 <= PERCENT <= 100, got {text!r}"
        )
    return Pattern(kind, percent)


def positive_cells(
    pattern: Pattern, batch: int, height: int, width: int, seed: int = 0
) -> np.ndarray:
    """Positive cells, (B, H, W) bool; the share is met for each image, rounded up to a cell.

    "scattered" takes cells at random; "clustered" lays blocks of 8 lines of 16 cells (as far as
    the grid and what is left of the share allow) at random places.
    """
    rng = np.random.default_rng(seed)
    wanted = math.ceil(height * width * pattern.percent / 100)
    if wanted in (0, height * width):
        return np.full((batch, height, width), wanted > 0)
    cells = np.zeros((batch, height, width), dtype=bool)
    for image in cells:
        if pattern.kind == "scattered":
            image.reshape(-1)[rng.choice(height * width, wanted, replace=False)] = True
        else:
            _lay_blocks(image, wanted, rng)
    return cells


def _lay_blocks(image: np.ndarray, wanted: int, rng: np.random.Generator) -> None:
    height, width = image.shape
    while wanted > 0:
        columns = min(_CLUSTER[1], width, wanted)
        rows = min(_CLUSTER[0], height, max(1, wanted // columns))
        top = rng.integers(height - rows + 1)
        left = rng.integers(width - columns + 1)
        block = image[top : top + rows, left : left + columns]
        wanted -= block.size - np.count_nonzero(block)
        block[:] = True


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Draw predictions and targets for a case: normal numbers, confidence 1 or 0 in the target."""
    batch, _, height, width = case.size
    positive = positive_cells(case.pattern, batch, height, width, seed)
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
    pred = torch.randn(case.size, generator=generator, **options)
    target = torch.randn(case.size, generator=generator, **options)
    target[:, -1] = torch.from_numpy(positive).to(**options)
    memory_format = LAYOUTS[case.layout]
    return Inputs(
        pred.contiguous(memory_format=memory_format).requires_grad_(),
        target.contiguous(memory_format=memory_format),
        positive.reshape(batch, -1),
    )


def expected_bytes_per_cell(
    case: Case, positive: np.ndarray, pass_: str, device_type: str
) -> float:
    """Bytes that the fused loss has to move for one cell, counted on the pattern itself.

    With `s` the bytes of an element and `f` the share of the sectors (32 bytes on a GPU, a line of
    64 on a CPU) of one map that hold a positive cell, a contiguous input costs

    - the confidence of pred and target, always: 2 s;
    - the C - 1 pose maps of both, where a sector holds a positive cell: 2 (C - 1) s f;
    - the gradient, if one is wanted: C s.

    So C = 7 in float32 costs 8 + 48 f under `no_grad` and 36 + 48 f with the gradient, 84 where
    every sector holds a positive cell. In float16 the gradient must not be rounded before it is
    scaled, so backward reads again: 2 (4 + 24 f) + 14. Channels-last interleaves the maps: every
    one is read, 3 C s = 84.

    `pass_` is "no_grad", "forward" (of a pred that requires grad: the gradient is written by it,
    except in float16), "step" (forward and backward) or "scaled" (the same with a grad_output that
    is not 1: what can be non-zero is computed again, 12 + 72 f more in float32).
    """
    maps, element = case.size[1], DTYPES[case.dtype].itemsize
    if case.layout == "channels_last":
        share = 1.0
    else:
        share = touched_share(positive, max(1, SECTOR_BYTES[device_type] // element))
    confidence, pose = 2 * element, 2 * (maps - 1) * element * share
    if case.layout == "channels_last":
        pose = 2 * (maps - 1) * element
    reads, gradient = confidence + pose, maps * element
    recomputes = case.dtype == "float16"
    if pass_ == "no_grad" or (pass_ == "forward" and recomputes):
        return reads
    if pass_ == "scaled" and not recomputes:
        # the confidence map and the touched sectors are read and their gradient is written again
        return reads + gradient + reads + element + (maps - 1) * element * share
    if pass_ in ("step", "scaled") and recomputes:
        return 2 * reads + gradient
    return reads + gradient


def touched_share(positive: np.ndarray, cells_per_sector: int) -> float:
    """Share of the sectors of a map (B, cells) that hold a positive cell."""
    images, cells = positive.shape
    sectors = -(-cells // cells_per_sector)
    padded = np.zeros((images, sectors * cells_per_sector), dtype=bool)
    padded[:, :cells] = positive
    return float(padded.reshape(-1, cells_per_sector).any(axis=1).mean()) if padded.size else 0.0


def product(
    sizes: Iterable[tuple[int, int, int, int]],
    patterns: Sequence[Pattern],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    threads: Sequence[int],
) -> list[Case]:
    """Every combination, in the order of the arguments."""
    return [
        Case(size, pattern, dtype, layout, count)
        for size in sizes
        for pattern in patterns
        for dtype in dtypes
        for layout in layouts
        for count in threads
    ]
