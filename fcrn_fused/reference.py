"""The definition of the loss in plain PyTorch: fallback on any device, and the tests' oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import COUNT_POSITIVE, DIVISORS
from .stats import FCRNLossStats
from .validation import Rule, check, make_rule

_SUMMED_BY_ONE_THREAD = 32_768


def fcrn_loss(
    pred: Tensor,
    target: Tensor,
    *,
    negative_weight: float | Tensor = 1.0,
    positive_weight: float = 1.0,
    coord_weight: float | Sequence[float] | Tensor = 1.0,
    ignore_value: float | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """The loss of `fcrn_fused.fcrn_loss`, with the same arguments, by PyTorch's own operations.

    Every promise about values and gradients holds here too; what it costs is memory and time:
    some thirty passes over the maps instead of one.
    """
    rule = make_rule(negative_weight, positive_weight, coord_weight, ignore_value, reduction)
    check(pred, target, rule)
    return loss_by_rule(pred, target, rule, return_stats)


def loss_by_rule(
    pred: Tensor, target: Tensor, rule: Rule, return_stats: bool
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """`fcrn_loss` for a rule that has been checked already."""
    cells = weigh(pred, target, rule)
    errors = cells.weight * cells.difference**2
    if rule.reduction == "none":
        loss = errors
    elif rule.reduction == "cell":
        loss = errors.sum(1) / _divisor(pred, cells, rule.reduction)
    else:
        loss = _sum(errors) / _divisor(pred, cells, rule.reduction)
    if not return_stats:
        return loss
    confidence_error = errors[:, -1:].detach()
    return loss, FCRNLossStats(
        coord=_sum(errors[:, :-1].detach()),
        positive_conf=_sum(torch.where(cells.positive, confidence_error, 0)),
        negative_conf=_sum(torch.where(cells.positive, 0, confidence_error)),
        num_positive=cells.positive.sum(),
    )


class WeighedCells(NamedTuple):
    """The cells of a batch after the table of the definition has been applied to them."""

    counted: Tensor  # (B, C, *S) bool: the element is part of the computation
    positive: Tensor  # (B, 1, *S) bool
    weight: Tensor  # (B, C, *S), 0 where not counted
    difference: Tensor  # (B, C, *S), pred - target, 0 where not counted


def weigh(pred: Tensor, target: Tensor, rule: Rule) -> WeighedCells:
    """Apply the definition's table: the kind of each cell, and from it each element's weight."""
    dtype = accumulation_dtype(pred.dtype, target.dtype)
    num_maps = target.shape[1]
    per_map = (num_maps,) + (1,) * (target.dim() - 2)

    confidence = target[:, -1:]
    ignored = torch.zeros_like(confidence, dtype=torch.bool)
    if rule.ignore_value is not None:
        value = torch.tensor(rule.ignore_value, dtype=torch.float64, device="cpu")
        ignored = confidence == value.to(target.dtype)
    positive = (confidence > 0) & ~ignored
    is_confidence = (torch.arange(num_maps, device=target.device) == num_maps - 1).view(per_map)
    counted = positive | (is_confidence & ~ignored)
    # in the memory format of pred, and so is all that follows, the gradient included
    counted = torch.zeros_like(pred, dtype=torch.bool) | counted

    negative_weight = rule.negative_weight
    if isinstance(negative_weight, Tensor):
        negative_weight = negative_weight.to(dtype)
    positive_weight = _positive_weights(rule, num_maps, dtype, target.device).view(per_map)
    weight = torch.where(positive, positive_weight, negative_weight)
    return WeighedCells(
        counted,
        positive,
        torch.where(counted, weight, 0),
        # not a product with a 0/1 mask: 0 * nan is nan
        torch.where(counted, pred.to(dtype) - target.to(dtype), 0),
    )


def gradient(grad_output: Tensor, pred: Tensor, target: Tensor, rule: Rule) -> Tensor:
    """dloss/dpred, (B, C, *S), as an expression that autograd can differentiate once more.

    dloss/dtarget is its negative. `grad_output` has the loss's shape and dtype.
    """
    cells = weigh(pred, target, rule)
    scale = grad_output.unsqueeze(1) if rule.reduction == "cell" else grad_output
    scale = scale / _divisor(pred, cells, rule.reduction)
    return torch.where(cells.counted, 2 * cells.weight * cells.difference * scale, 0)


def accumulation_dtype(pred: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: the wider of the two, at least float32."""
    return torch.promote_types(torch.promote_types(pred, target), torch.float32)


def _sum(errors: Tensor) -> Tensor:
    """The sum of (B, C, *S), the same whatever the number of threads.

    PyTorch splits a sum to one number among its threads from 32,768 elements on; a sum to several
    numbers gives each of them to one thread.
    """
    spatial = tuple(range(2, errors.dim()))
    if spatial and errors.shape[0] * errors.shape[1] > 1:
        errors = errors.sum(spatial)
    if errors.numel() <= _SUMMED_BY_ONE_THREAD:
        return errors.sum()
    pieces = errors.flatten().split(_SUMMED_BY_ONE_THREAD)
    return torch.stack([piece.sum() for piece in pieces]).sum()


def _divisor(pred: Tensor, cells: WeighedCells, reduction: str) -> int | Tensor:
    divisor = DIVISORS[reduction](pred)
    return cells.positive.sum().clamp(min=1) if divisor == COUNT_POSITIVE else divisor


def _positive_weights(
    rule: Rule, num_maps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weights of a positive cell's maps, (C,): the pose maps' and then the confidence's."""

    def filled(number: float, count: int = 1) -> Tensor:
        # on the device: a copy from the host would synchronise
        return torch.full((count,), number, dtype=dtype, device=device)

    weights = rule.coord_weight
    if isinstance(weights, Tensor):
        coord = [weights.to(device, dtype).expand(num_maps - 1)]
    elif isinstance(weights, (float, int)):
        coord = [filled(weights, num_maps - 1)]
    else:
        coord = [filled(weight) for weight in weights]
    return torch.cat([*coord, filled(rule.positive_weight)])
