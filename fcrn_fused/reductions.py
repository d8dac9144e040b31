"""The reductions: what the weighted squared errors are divided by. The rest follows this table."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

COUNT_POSITIVE = -1  # divide by the number of positive cells, but at least by 1

DIVISORS: dict[str, Callable[[Tensor], int]] = {
    "mean": lambda pred: pred.numel(),
    "sum": lambda pred: 1,
    "batchmean": lambda pred: pred.shape[0],
    "positive": lambda pred: COUNT_POSITIVE,
    "cell": lambda pred: pred.shape[1],
    "none": lambda pred: 1,
}
# Those with more than one number as a result, by what the operators call them; the others are 0.
OUTPUTS = {"cell": 1, "none": 2}
# Those of `masked_mse_loss`, whose "mean" divides by the sum of the weights, if there are any.
MASKED_REDUCTIONS = ("mean", "sum", "none")
