"""Predictions and targets as an FCRN sees them, and weights, at random, from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import make_batch

__all__ = ["DTYPES", "REDUCTIONS", "SCALAR_REDUCTIONS", "make_batch", "make_weight"]

REDUCTIONS = ("mean", "sum", "batchmean", "positive", "cell", "none")
SCALAR_REDUCTIONS = REDUCTIONS[:4]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
