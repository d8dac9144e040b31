"""Predictions and targets as an FCRN sees them, at random, from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "batchmean", "positive", "cell", "none")
SCALAR_REDUCTIONS = REDUCTIONS[:4]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def make_batch(
    shape: tuple[int, ...] = (2, 7, 5, 6),
    *,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    device: str = "cpu",
    positives: float = 0.3,
    ignored: float = 0.0,
    ignore_value: float = -1.0,
    requires_grad: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(pred, target)` with shares of positive and ignored cells; the rest is negative.

    Every place that is not part of the computation holds an ordinary number, so that a mask
    forgotten shows in the result.
    """
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.rand((shape[0], *shape[2:]), generator=generator)
    confidence = torch.zeros_like(kind, dtype=torch.float64)
    confidence[kind < positives] = 1.0
    confidence[(positives <= kind) & (kind < positives + ignored)] = ignore_value
    target[:, -1] = confidence
    pred = pred.to(device, dtype)
    target = target.to(device, target_dtype or dtype)
    return pred.requires_grad_(requires_grad), target


def make_weight(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    zeros: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """A share of zeros but the first, the rest between 0.1 and 4.1 or, of bool, True."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = 0.1 + 4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    counts = torch.rand(shape, generator=generator) >= zeros
    counts.view(-1)[:1] = True
    return torch.where(counts, weight, 0).to(device, dtype)
