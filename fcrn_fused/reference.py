"""The loss in plain PyTorch: its definition, the fallback on any device and the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import COUNT_POSITIVE, DIVISORS
from .stats import FCRNLossStats
from .tracing import is_traced
from .validation import Rule, check, checked, make_masked_rule

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
    """`fcrn_fused.fcrn_loss` in plain PyTorch: the same arguments, values, gradients and errors.

    It takes about thirty passes over the maps instead of one, and the memory for their results.
    """
    rule = Rule(
        negative_weight, positive_weight, coord_weight, ignore_value, reduction, weight, positive
    )
    rule = checked(rule)
    check(pred, target, rule)
    return loss_by_rule(pred, target, rule, return_stats)


def masked_mse_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """`fcrn_fused.masked_mse_loss` in plain PyTorch."""
    rule = make_masked_rule(weight, reduction)
    check(pred, target, rule)
    loss = loss_by_rule(pred, target, rule, return_stats=False)
    assert isinstance(loss, Tensor)
    return loss


def loss_by_rule(
    pred: Tensor, target: Tensor, rule: Rule, return_stats: bool
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """`fcrn_loss` or `masked_mse_loss` of arguments that have been checked."""
    cells = apply_rule(pred, target, rule)
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


class WeightedCells(NamedTuple):
    """The elements of a batch, each with its weight."""

    counted: Tensor  # of pred's shape, bool: False where an element is masked or ignored
    positive: Tensor  # (B, 1, *S) bool; has no meaning without kinds
    weight: Tensor  # of pred's shape, 0 where not counted
    difference: Tensor  # pred - target, 0 where not counted


def apply_rule(pred: Tensor, target: Tensor, rule: Rule) -> WeightedCells:
    """Find the kind of each cell, and from it the weight of each element."""
    dtype = accumulation_dtype(pred.dtype, target.dtype)
    if rule.has_kinds:
        counted, positive, weight = _weights_by_kind(pred, target, rule, dtype)
    else:
        counted = positive = torch.ones_like(pred, dtype=torch.bool)
        weight = torch.ones((), dtype=dtype, device=pred.device)
    if rule.weight is not None:
        given = rule.weight.to(dtype)
        counts = given != 0  # may be on the CPU if it is 0-dim
        counted = counted & counts
        if rule.has_kinds:
            positive = positive & (counts[:, -1:] if counts.dim() > 0 else counts)
        weight = weight * given
    return WeightedCells(
        counted,
        positive,
        torch.where(counted, weight, 0),
        # Not a product with a 0/1 mask: 0 * nan is nan.
        torch.where(counted, pred.to(dtype) - target.to(dtype), 0),
    )


def _weights_by_kind(
    pred: Tensor, target: Tensor, rule: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements count, (B, C, *S), which cells are positive, (B, 1, *S), and the weights."""
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
    # Give what follows, the gradient included, the memory format of pred.
    counted = torch.zeros_like(pred, dtype=torch.bool) | counted

    negative_weight = rule.negative_weight
    if isinstance(negative_weight, Tensor):
        negative_weight = negative_weight.to(dtype)
    positive_weight = _positive_weights(rule, num_maps, dtype, target.device).view(per_map)
    return counted, positive, torch.where(positive, positive_weight, negative_weight)


def gradient(grad_output: Tensor, pred: Tensor, target: Tensor, rule: Rule) -> Tensor:
    """dloss/dpred, (B, C, *S), by operations that autograd can differentiate once more.

    dloss/dtarget is its negative. `grad_output` has the shape and dtype of the loss.
    """
    cells = apply_rule(pred, target, rule)
    scale = grad_output.unsqueeze(1) if rule.reduction == "cell" else grad_output
    scale = (scale / _divisor(pred, cells, rule)).to(cells.weight.dtype)
    return torch.where(cells.counted, 2 * cells.weight * cells.difference * scale, 0)


def accumulation_dtype(pred: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and the loss: the wider of the two, at least float32."""
    return torch.promote_types(torch.promote_types(pred, target), torch.float32)


def _sum(values: Tensor) -> Tensor:
    """The sum of a tensor, 0-dim, with the same bits for any number of threads.

    PyTorch splits a full reduction among its threads from 32,768 elements on; in a partial one,
    each result is computed by one thread.
    """
    kept = min(2, values.dim() - 1)
    if kept > 0 and values.shape[0] * values.shape[kept - 1] > 1:
        values = values.sum(tuple(range(kept, values.dim())))
    # The number of pieces would be a constant of a traced program.
    if is_traced() or values.numel() <= _SUMMED_BY_ONE_THREAD:
        return values.sum()
    pieces = values.flatten().split(_SUMMED_BY_ONE_THREAD)
    return torch.stack([piece.sum() for piece in pieces]).sum()


def _divisor(pred: Tensor, cells: WeightedCells, rule: Rule) -> int | Tensor:
    if (total := weight_sum(pred, rule)) is not None:
        return total
    divisor = DIVISORS[rule.reduction](pred)
    return cells.positive.sum().clamp(min=1) if divisor == COUNT_POSITIVE else divisor


def weight_total(weight: Tensor, repeats: int) -> Tensor:
    """`repeats` times the sum of a tensor of weights, 0-dim, in float64; infinity where it is 0."""
    is_bool = weight.dtype is torch.bool
    total = weight.sum() if is_bool else _sum(weight.to(_widest(weight.device)))
    if weight.dtype is torch.float64:  # summing the deviations from the mean rounds less
        mean = total / max(weight.numel(), 1)
        total = mean * weight.numel() + _sum(weight - mean)
    total = total.to(_widest(weight.device)) * repeats
    return total.masked_fill(total == 0, math.inf)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def weight_sum(
    pred: Tensor, rule: Rule, total: Callable[[Tensor, int], Tensor] = weight_total
) -> Tensor | None:
    """The divisor of the "mean" of `masked_mse_loss`: the sum of the weights of all elements.

    A 0-dim float64 tensor; infinity where the sum is 0, so that the mean is 0. None for other
    losses, and for empty inputs, whose mean is NaN as that of `mse_loss` is.
    """
    weight = rule.weight
    if rule.has_kinds or rule.reduction != "mean" or weight is None or pred.numel() == 0:
        return None
    if not is_traced():  # a traced program may meet other strides
        for dim, stride in enumerate(weight.stride()):
            if stride == 0:  # expanded: sum the elements that are in memory
                weight = weight.narrow(dim, 0, 1)
    return total(weight, pred.numel() // max(weight.numel(), 1))


def _positive_weights(
    rule: Rule, num_maps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weights of the maps of a positive cell, (C,): the pose maps, then the confidence."""

    def filled(number: float, count: int = 1) -> Tensor:
        # Made on the device: a copy from the host would synchronise.
        return torch.full((count,), number, dtype=dtype, device=device)

    weights = rule.coord_weight
    if isinstance(weights, Tensor):
        coord = [weights.to(device, dtype).expand(num_maps - 1)]
    elif isinstance(weights, (float, int)):
        coord = [filled(weights, num_maps - 1)]
    else:
        coord = [filled(weight) for weight in weights]
    return torch.cat([*coord, filled(rule.positive_weight)])
