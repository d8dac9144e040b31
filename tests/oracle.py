"""The definition of the losses, element by element in plain loops and extended precision.

Written from the table of the contract and from nothing else, so that it can disagree with both the
reference and the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Truth(NamedTuple):
    loss: np.ndarray  # as the reduction shapes it
    grad: np.ndarray  # dloss/dpred for the grad_output, (B, C, *S); dloss/dtarget is its negative
    coord: float
    positive_conf: float
    negative_conf: float
    num_positive: int


def fcrn_loss(
    pred: Tensor,
    target: Tensor,
    *,
    negative_weight: float | Tensor = 1.0,
    positive_weight: float = 1.0,
    coord_weight: float | Sequence[float] | Tensor = 1.0,
    ignore_value: float | None = None,
    weight: Tensor | None = None,
    positive: Tensor | None = None,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> Truth:
    shape = tuple(pred.shape)
    batch, maps = shape[:2]
    cells = math.prod(shape[2:])
    p = _extended(pred).reshape(batch, maps, cells)
    t = _extended(target).reshape(batch, maps, cells)
    coord_weights = _each_pose_map(coord_weight, maps - 1)
    negative = _number(negative_weight)
    ignored = None
    if ignore_value is not None:
        ignored = torch.tensor(ignore_value, dtype=torch.float64).to(target.dtype).item()

    given = _each(weight, shape).reshape(batch, maps, cells)
    if positive is not None:
        said = _each(positive, (batch, 1, *shape[2:])).reshape(batch, cells)

    error = np.zeros((batch, maps, cells), np.longdouble)
    slope = np.zeros((batch, maps, cells), np.longdouble)
    part = np.zeros((batch, maps, cells), bool)  # of the computation
    coord = positive_conf = negative_conf = np.longdouble(0)
    num_positive = 0
    for b in range(batch):
        for s in range(cells):
            confidence = t[b, -1, s]
            if ignored is not None and confidence == ignored:
                continue
            is_positive = confidence > 0 if positive is None else said[b, s] == 1
            num_positive += int(is_positive and given[b, -1, s] != 0)
            for j in range(maps):
                if j == maps - 1:
                    factor = positive_weight if is_positive else negative
                elif is_positive:
                    factor = coord_weights[j]
                else:
                    continue
                if given[b, j, s] == 0:
                    continue
                part[b, j, s] = True
                difference = p[b, j, s] - t[b, j, s]
                error[b, j, s] = factor * given[b, j, s] * difference * difference
                slope[b, j, s] = 2 * factor * given[b, j, s] * difference
                if j < maps - 1:
                    coord += error[b, j, s]
                elif is_positive:
                    positive_conf += error[b, j, s]
                else:
                    negative_conf += error[b, j, s]

    upstream = np.asarray(
        _extended(grad_output) if isinstance(grad_output, Tensor) else grad_output
    )
    total = error.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        if reduction == "none":
            loss = error.reshape(shape)
            scale = upstream.reshape(error.shape) if upstream.ndim else upstream
        elif reduction == "cell":
            loss = (error.sum(1) / maps).reshape(batch, *shape[2:])
            scale = (upstream.reshape(batch, 1, cells) if upstream.ndim else upstream) / maps
        else:
            divisor = {
                "mean": error.size,
                "sum": 1,
                "batchmean": batch,
                "positive": max(1, num_positive),
            }[reduction]
            loss = np.divide(total, divisor)
            scale = np.divide(upstream, divisor)
    # what is not part of the computation has no gradient, whatever comes from above
    grad = np.zeros(error.shape, np.longdouble)
    np.multiply(slope, scale, out=grad, where=part)
    return Truth(
        np.asarray(loss),
        grad.reshape(shape),
        float(coord),
        float(positive_conf),
        float(negative_conf),
        num_positive,
    )


def masked_mse_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The loss and dloss/dpred for the grad_output; dloss/dtarget is its negative."""
    p, t, w = _extended(pred), _extended(target), _each(weight, tuple(pred.shape))
    upstream = np.broadcast_to(
        _extended(grad_output) if isinstance(grad_output, Tensor) else grad_output, p.shape
    )
    scale = np.longdouble(1)
    if reduction == "mean":
        scale = 1 / w.sum() if w.sum() != 0 else np.longdouble(0)
    error = np.zeros(p.shape, np.longdouble)
    grad = np.zeros(p.shape, np.longdouble)
    for place in np.ndindex(p.shape):
        if w[place] != 0:
            difference = p[place] - t[place]
            error[place] = w[place] * difference * difference
            grad[place] = 2 * w[place] * difference * scale * upstream[place]
    if reduction == "none":
        return error, grad
    if reduction == "mean" and error.size == 0:
        return np.asarray(np.nan), grad
    return np.asarray(error.sum() * scale), grad


def _each(weight: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of each element."""
    return np.broadcast_to(np.longdouble(1) if weight is None else _extended(weight), shape)


def _extended(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def _number(weight: float | Tensor) -> np.longdouble:
    return np.longdouble(weight.item() if isinstance(weight, Tensor) else weight)


def _each_pose_map(
    coord_weight: float | Sequence[float] | Tensor, num_pose_maps: int
) -> list[np.longdouble]:
    values = coord_weight.tolist() if isinstance(coord_weight, Tensor) else coord_weight
    if isinstance(values, Sequence):
        return [np.longdouble(value) for value in values]
    return [np.longdouble(values)] * num_pose_maps
