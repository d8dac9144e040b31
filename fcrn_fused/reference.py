"""The definition of the loss in plain PyTorch: fallback on any device, and the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import COUNT_POSITIVE, DIVISORS
from .stats import FCRNLossStats
from .tracing import is_traced
from .validation import Rule, check, make_masked_rule, make_rule

_SUMMED_BY_ONE_THREAD = 32_768


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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """The loss of `fcrn_fused.fcrn_loss`, with the same arguments, by PyTorch's own operations.

    Every promise about values and gradients holds here too; what it costs is memory and time:
    some thirty passes over the maps instead of one.
    """
    rule = make_rule(
        negative_weight, positive_weight, coord_weight, ignore_value, reduction, weight, positive
    )
    check(pred, target, rule)
    return loss_by_rule(pred, target, rule, return_stats)


def masked_mse_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """The loss of `fcrn_fused.masked_mse_loss`, by PyTorch's own operations."""
    rule = make_masked_rule(weight, reduction)
    check(pred, target, rule)
    loss = loss_by_rule(pred, target, rule, return_stats=False)
    assert isinstance(loss, Tensor)
    return loss


def loss_by_rule(
    pred: Tensor, target: Tensor, rule: Rule, return_stats: bool
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """`fcrn_loss` for a rule that has been checked already."""
    cells = weigh(pred, target, rule)
    errors = cells.weight * cells.difference**2
    if rule.reduction == "none":
        loss = errors
    elif rule.reduction == "cell":
        loss = errors.sum(1) / _divisor(pred, cells, rule)
    else:
        loss = (_sum(errors) / _divisor(pred, cells, rule)).to(errors.dtype)
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
    """The elements of a batch after the table of the definition has been applied to them."""

    counted: Tensor  # of pred's shape, bool: the element is part of the computation
    positive: Tensor  # (B, 1, *S) bool; without kinds of no meaning
    weight: Tensor  # of pred's shape, 0 where not counted
    difference: Tensor  # of pred's shape, pred - target, 0 where not counted


def weigh(pred: Tensor, target: Tensor, rule: Rule) -> WeighedCells:
    """Apply the definition's table: the kind of each cell, and from it each element's weight."""
    dtype = accumulation_dtype(pred.dtype, target.dtype)
    if rule.has_kinds:
        counted, positive, weight = _weigh_by_kind(pred, target, rule, dtype)
    else:
        counted = positive = torch.ones_like(pred, dtype=torch.bool)
        weight = torch.ones((), dtype=dtype, device=pred.device)
    if rule.weight is not None:
        given = rule.weight.to(dtype)
        counts = given != 0  # 0-dim, it may be on the CPU
        counted = counted & counts
        if rule.has_kinds:
            positive = positive & (counts[:, -1:] if counts.dim() > 0 else counts)
        weight = weight * given
    return WeighedCells(
        counted,
        positive,
        torch.where(counted, weight, 0),
        # not a product with a 0/1 mask: 0 * nan is nan
        torch.where(counted, pred.to(dtype) - target.to(dtype), 0),
    )


def _weigh_by_kind(
    pred: Tensor, target: Tensor, rule: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What counts and the weights, (B, C, *S), and which cells are positive, (B, 1, *S)."""
    num_maps = target.shape[1]
    per_map = (num_maps,) + (1,) * (target.dim() - 2)

    confidence = target[:, -1:]
    ignored = torch.zeros_like(confidence, dtype=torch.bool)
    if rule.ignore_value is not None:
        value = torch.tensor(rule.ignore_value, dtype=torch.float64, device="cpu")
        ignored = confidence == value.to(target.dtype)
    positive = (confidence > 0 if rule.positive is None else rule.positive) & ~ignored
    is_confidence = (torch.arange(num_maps, device=target.device) == num_maps - 1).view(per_map)
    counted = positive | (is_confidence & ~ignored)
    # in the memory format of pred, and so is all that follows, the gradient included
    counted = torch.zeros_like(pred, dtype=torch.bool) | counted

    negative_weight = rule.negative_weight
    if isinstance(negative_weight, Tensor):
        negative_weight = negative_weight.to(dtype)
    positive_weight = _positive_weights(rule, num_maps, dtype, target.device).view(per_map)
    return counted, positive, torch.where(positive, positive_weight, negative_weight)


def gradient(grad_output: Tensor, pred: Tensor, target: Tensor, rule: Rule) -> Tensor:
    """dloss/dpred, (B, C, *S), as an expression that autograd can differentiate once more.

    dloss/dtarget is its negative. `grad_output` has the loss's shape and dtype.
    """
    cells = weigh(pred, target, rule)
    scale = grad_output.unsqueeze(1) if rule.reduction == "cell" else grad_output
    scale = (scale / _divisor(pred, cells, rule)).to(cells.weight.dtype)
    return torch.where(cells.counted, 2 * cells.weight * cells.difference * scale, 0)


def accumulation_dtype(pred: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: the wider of the two, at least float32."""
    return torch.promote_types(torch.promote_types(pred, target), torch.float32)


def _sum(values: Tensor) -> Tensor:
    """The sum of a tensor, the same whatever the number of threads.

    PyTorch splits a sum to one number among its threads from 32,768 elements on; a sum to several
    numbers gives each of them to one thread.
    """
    kept = min(2, values.dim() - 1)
    if kept > 0 and values.shape[0] * values.shape[kept - 1] > 1:
        values = values.sum(tuple(range(kept, values.dim())))
    # a traced program would sum the same number of pieces whatever it is given
    if is_traced() or values.numel() <= _SUMMED_BY_ONE_THREAD:
        return values.sum()
    pieces = values.flatten().split(_SUMMED_BY_ONE_THREAD)
    return torch.stack([piece.sum() for piece in pieces]).sum()


def _divisor(pred: Tensor, cells: WeighedCells, rule: Rule) -> int | Tensor:
    if (total := weight_sum(pred, rule)) is not None:
        return total
    divisor = DIVISORS[rule.reduction](pred)
    return cells.positive.sum().clamp(min=1) if divisor == COUNT_POSITIVE else divisor


def weight_total(weight: Tensor) -> Tensor:
    """The sum of a tensor of weights, 0-dim, exact or in float64: gradients are divided by it."""
    if weight.dtype is torch.bool:
        return weight.sum()
    total = _sum(weight.to(_widest(weight.device)))
    if weight.dtype is torch.float64:  # again from their mean on: what that rounds is less
        mean = total / max(weight.numel(), 1)
        total = mean * weight.numel() + _sum(weight - mean)
    return total


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has no float64


def weight_sum(
    pred: Tensor, rule: Rule, total: Callable[[Tensor], Tensor] = weight_total
) -> Tensor | None:
    """By what the "mean" of `masked_mse_loss` is divided: the sum of all elements' weights.

    A 0-dim float64 tensor, infinite where the sum is 0: what is divided by it is 0. None: it is not
    wanted, or there is no element, and then the mean is NaN as that of `mse_loss` is.
    """
    weight = rule.weight
    if rule.has_kinds or rule.reduction != "mean" or weight is None or pred.numel() == 0:
        return None
    if not is_traced():  # which would keep the strides of its example
        for dim, stride in enumerate(weight.stride()):
            if stride == 0:  # expanded: what repeats itself is summed once, and not written out
                weight = weight.narrow(dim, 0, 1)
    repeats = pred.numel() // max(weight.numel(), 1)
    of_all = total(weight).to(_widest(weight.device)) * repeats
    return of_all.masked_fill(of_all == 0, math.inf)


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
