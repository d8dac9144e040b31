"""Inputs of the losses, for the benchmarks and the tests, and the bytes that each must move."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NEGATIVE_WEIGHT = 0.01  # where the annealing starts
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SECTOR_BYTES = {"cpu": 64, "cuda": 32}  # a cache line; a sector, the least that DRAM delivers
_CLUSTER = (8, 16)  # cells: a block of text, some lines high
_DRAWN_ON_THE_CPU = 2**25  # elements: more of them are drawn where they are needed


def make_batch(
    shape: tuple[int, ...] = (2, 7, 5, 6),
    *,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    positives: float | np.ndarray = 0.3,
    ignored: float = 0.0,
    ignore_value: float = -1.0,
    requires_grad: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(pred, target)` of `shape` (B, C, *S), normally distributed, the same on every device.

    `positives` is the share of positive cells or says of each, (B, *S), whether it is one;
    `ignored` is the share of ignored cells. Masked places hold ordinary numbers, so that a mask
    forgotten shows in the result. Large batches are drawn on the device and in its dtype.
    """
    large = math.prod(shape) > _DRAWN_ON_THE_CPU
    place: dict[str, Any] = (
        {"device": device, "dtype": dtype} if large else {"dtype": torch.float64}
    )
    generator = torch.Generator(device if large else "cpu").manual_seed(seed)
    pred = torch.randn(shape, generator=generator, **place)
    target = torch.randn(shape, generator=generator, **place)
    if isinstance(positives, np.ndarray):
        target[:, -1] = torch.from_numpy(positives).to(**place)
    else:
        cells = (shape[0], *shape[2:])
        kind = torch.rand(cells, generator=generator, device=generator.device)
        confidence = (kind < positives).to(**place)
        confidence[(positives <= kind) & (kind < positives + ignored)] = ignore_value
        target[:, -1] = confidence
    pred = pred.to(device, dtype)
    return pred.requires_grad_(requires_grad), target.to(device, target_dtype or dtype)


class Case(NamedTuple):
    """One input of a loss: of `fcrn_loss` or, with a `weight_shape`, of `masked_mse_loss`.

    `pattern` says which cells are positive or which elements of the weight count: "none", "all",
    "scattered:PERCENT" (at random), "clustered:PERCENT" (blocks of 8 x 16) or "first:PERCENT". The
    weight is a bool mask or, with pred's shape, of float.
    """

    shape: tuple[int, ...]
    pattern: str = "clustered:2"
    dtype: str = "float32"
    layout: str = "contiguous"
    weight_shape: tuple[int, ...] | None = None

    @property
    def units(self) -> int:
        """The number of cells or, for a masked loss, of elements: bytes are given for each."""
        elements = math.prod(self.shape)
        return elements if self.weight_shape else elements // self.shape[1]

    @property
    def is_plain(self) -> bool:
        return self == Case(self.shape)

    @property
    def label(self) -> str:
        """The case in a few words; float32 and contiguous are left out."""
        words = [f"({', '.join(map(str, self.shape))})"]
        if self.weight_shape == self.shape:
            words.append("a weight for each element")
        elif self.weight_shape:
            percent = self.pattern.partition(":")[2]
            words.append(f"mask ({', '.join(map(str, self.weight_shape))}), {percent} % count")
        elif self.pattern in ("none", "all"):
            words.append(f"{self.pattern} positive")
        else:
            kind, _, percent = self.pattern.partition(":")
            words.append(f"{percent} % {kind}")
        if self.dtype != "float32":
            words.append(self.dtype)
        if self.layout != "contiguous":
            words.append(self.layout.replace("_", "-"))
        return ", ".join(words)


class Inputs(NamedTuple):
    """What a loss is called with, and which cells are positive or which elements count."""

    pred: Tensor
    target: Tensor
    chosen: np.ndarray  # bool: (B, *S), or of the weight's shape
    weight: Tensor | None  # of a masked loss


def make_inputs(case: Case, device: str | torch.device, seed: int = 0) -> Inputs:
    batch, _, *space = case.shape
    chosen = choose(case.pattern, case.weight_shape or (batch, *space), seed)
    positives = 0.0 if case.weight_shape else chosen
    batch_of_case = make_batch(
        case.shape,
        dtype=DTYPES[case.dtype],
        device=device,
        positives=positives,
        requires_grad=False,
        seed=seed,
    )
    pred, target = (each.contiguous(memory_format=LAYOUTS[case.layout]) for each in batch_of_case)
    weight = torch.from_numpy(chosen).to(device) if case.weight_shape else None
    if case.weight_shape == case.shape:
        weight = torch.rand_like(target) + 0.1
    return Inputs(pred.requires_grad_(), target, chosen, weight)


def choose(pattern: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Which elements of `shape` (B, ..., W) a pattern takes: its share in each of B, rounded up.

    Raises:
        ValueError: `pattern` is not one of those that `Case` names.
    """
    kind, _, percent = {"none": "first:0", "all": "first:100"}.get(pattern, pattern).partition(":")
    if (
        kind not in ("clustered", "scattered", "first")
        or not percent.replace(".", "", 1).isdecimal()
    ):
        raise ValueError(
            "a pattern is none, all, clustered:PERCENT, scattered:PERCENT or first:PERCENT, "
            f"got {pattern!r}"
        )
    generator = np.random.default_rng(seed)
    chosen = np.zeros(shape, bool)
    images = chosen.reshape(shape[0], -1, shape[-1])
    wanted = math.ceil(images[0].size * min(100.0, float(percent)) / 100)
    for image in images:
        if kind == "first":
            image.reshape(-1)[:wanted] = True
        elif kind == "scattered":
            image.reshape(-1)[generator.choice(image.size, wanted, replace=False)] = True
        else:
            _lay_blocks(image, wanted, generator)
    return chosen


def _lay_blocks(image: np.ndarray, wanted: int, generator: np.random.Generator) -> None:
    height, width = image.shape
    while wanted > 0:
        columns = min(_CLUSTER[1], width, wanted)
        rows = min(_CLUSTER[0], height, max(1, wanted // columns))
        top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
        block = image[top : top + rows, left : left + columns]
        wanted -= block.size - np.count_nonzero(block)
        block[:] = True


def expected_bytes(case: Case, chosen: np.ndarray, pass_: str, device_type: str) -> float:
    """Bytes that the fused loss has to move, counted on the pattern itself.

    Of `fcrn_loss`, for each cell, with `s` the bytes of an element and `f` the share of sectors (32
    bytes on a GPU, a cache line of 64 on a CPU) that hold a positive cell, or 1 in channels-last:

    - the confidence of pred and target: 2 s;
    - their C - 1 pose maps where a sector holds a positive cell: 2 (C - 1) s f;
    - the gradient, if there is one: C s.

    C = 7 in float32: 36 + 48 f, and 8 + 48 f under "no_grad". In float16 backward reads again,
    since a gradient must not be rounded before it is scaled. "scaled" is a "step" with a
    grad_output other than 1: the elements that can differ from 0 are computed and written again.

    Of `masked_mse_loss`, for each element: the gradient, s; pred and target where a sector holds an
    element that counts, 2 s f; and the weight, which is read for its sum and for the loss.
    """
    size = DTYPES[case.dtype].itemsize
    sector = max(1, SECTOR_BYTES[device_type] // size)
    writes_gradient = pass_ != "no_grad"
    if case.weight_shape:
        counts = np.broadcast_to(chosen, case.shape).reshape(case.shape[0], -1)
        of_weight = 4 if case.weight_shape == case.shape else 1
        per_element = 2 * size * touched_share(counts, sector) + size * writes_gradient
        return case.units * per_element + 2 * of_weight * math.prod(case.weight_shape)
    maps = case.shape[1]
    interleaved = case.layout == "channels_last"
    share = 1.0 if interleaved else touched_share(chosen.reshape(case.shape[0], -1), sector)
    reads, gradient = 2 * size * (1 + (maps - 1) * share), maps * size
    if not writes_gradient:
        return case.units * reads
    if case.dtype == "float16":
        return case.units * (2 * reads + gradient)
    again = reads + size * (1 + (maps - 1) * share) if pass_ == "scaled" else 0
    return case.units * (reads + gradient + again)


def touched_share(chosen: np.ndarray, sector: int) -> float:
    """The share of the sectors of a map, (B, elements), that hold a chosen element."""
    sectors = -(-chosen.shape[1] // sector)
    padded = np.zeros((chosen.shape[0], sectors * sector), bool)
    padded[:, : chosen.shape[1]] = chosen
    return float(padded.reshape(-1, sector).any(axis=1).mean()) if padded.size else 0.0
