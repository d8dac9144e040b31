"""The reductions, as divisors of the sum of weighted squared errors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

COUNT_POSITIVE = -1  # the number of positive cells, at least 1

DIVISORS: dict[str, Callable[[Tensor], int]] = {
    "mean": lambda pred: pred.numel(),
    "sum": lambda pred: 1,
    "batchmean": lambda pred: pred.shape[0],
    "positive": lambda pred: COUNT_POSITIVE,
    "cell": lambda pred: pred.shape[1],
    "none": lambda pred: 1,
}
# The operators' `output` argument for reductions with more than one result; 0 for the others.
OUTPUTS = {"cell": 1, "none": 2}
# The reductions of `masked_mse_loss`; with a weight, "mean" divides by the sum of the weights.
MASKED_REDUCTIONS = ("mean", "sum", "none")
