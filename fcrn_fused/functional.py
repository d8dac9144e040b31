"""`fcrn_loss` and `masked_mse_loss`: check the arguments once and choose who computes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from . import ops, reference
from .autograd import FCRNLossFunction
from .stats import FCRNLossStats
from .tracing import is_jit_tracing, is_traced
from .validation import Rule, check, check_backend, make_masked_rule, make_rule


@overload
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
    return_stats: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
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
    return_stats: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, FCRNLossStats]: ...
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """Masked, weighted squared error of a fully-convolutional regression network (FCRN).

    Each cell of a grid predicts the pose of a text box and a confidence. With `t` the target
    confidence of a cell, the error of an element is `E = w * (pred - target)**2`, where `w` is

    - `coord_weight[j]` on pose map `j` and `positive_weight` on the confidence where `t > 0`,
    - 0 on the pose maps and `negative_weight` on the confidence elsewhere,
    - 0 throughout where `t == ignore_value`.

    An element of weight 0 by this table is no part of the computation: its error and gradient are
    exactly 0, whatever it holds, NaN included. (After Gupta, Vedaldi, Zisserman, "Synthetic Data
    for Text Localisation in Natural Images", CVPR 2016, and YOLO v1, arXiv 1506.02640, eq. 2.)

    Args:
        pred: predictions, (B, C, *S): C - 1 pose maps, then one confidence map; C = 7 and
            S = (H, W) for FCRN. float64, float32, float16 or bfloat16; any strides.
        target: what should have been predicted, of the same shape and on the same device, its
            dtype any of the four. In units of the cell or of the image, not in pixels.
        negative_weight: weight of the confidence of negative cells; a number, or a 0-dim tensor,
            which is read on its device (no synchronisation).
        positive_weight: weight of the confidence of positive cells.
        coord_weight: weight of the pose maps of positive cells; one number, a sequence of C - 1
            numbers, or a tensor of shape () or (C - 1,).
        ignore_value: target confidence of cells to leave out (compared in `target`'s dtype).
        weight: factor of `w`, bool or floating, on the device of `pred`: with as many dimensions as
            `pred`, each of its size or 1, (B, 1, *S) for cells, (B, C, 1, 1) for maps; or 0-dim,
            also on the CPU. Where it is 0 the element is masked as by the table; a cell whose
            confidence is masked is not counted among the positive ones.
        positive: which cells are positive in place of `t > 0`; bool, (B, 1, *S) or broadcasting to
            that.
        reduction: "mean" divides the sum of E by its number of elements, "batchmean" by B,
            "positive" by the number of positive cells (at least 1), "sum" by nothing; "cell" is
            the mean over the C maps of each cell, (B, *S); "none" is E itself, (B, C, *S).
        return_stats: return `(loss, FCRNLossStats)`.
        backend: "fused", the compiled kernels, or RuntimeError where none serves the input;
            "reference", plain PyTorch; "auto", the former where possible, else the latter.

    Returns:
        The loss, in the wider of the two dtypes but at least float32, differentiable with respect
        to `pred` and `target`; with `return_stats` also its detached parts.

    Raises:
        TypeError: `pred`, `target`, `weight` or `positive` is not a tensor, or another weight not a
            number.
        ValueError: a shape, dtype, device, weight, reduction, ignore_value or backend that does
            not fit; a weight that requires grad.
        RuntimeError: `backend="fused"` and no compiled kernel serves the input.
    """
    rule = make_rule(
        negative_weight, positive_weight, coord_weight, ignore_value, reduction, weight, positive
    )
    return loss_by_rule(pred, target, rule, return_stats, check_backend(backend))


def masked_mse_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error with a mask or weights: `E = weight * (pred - target)**2`.

    An element of weight 0 is no part of the computation: its error and gradient are exactly 0,
    whatever it holds, NaN included. A weight that repeats itself is read once where it does.

    Args:
        pred: predictions of any shape; float64, float32, float16 or bfloat16; any strides.
        target: of the same shape and on the same device, its dtype any of the four.
        weight: a mask (bool, True counts) or weights (floating), on the device of `pred`: with as
            many dimensions as `pred`, each of its size or 1, or 0-dim, also on the CPU; None: 1. A
            mask (B, H, W) for a pred (B, C, H, W) is to be given as `mask.unsqueeze(1)`.
        reduction: "mean" divides the sum of E by that of the weights of all elements, as
            `F.mse_loss(weight=weight)` does (0 where that sum is 0), "sum" by nothing; "none" is E.
        backend: as in `fcrn_loss`.

    Returns:
        The loss, in the wider of the two dtypes but at least float32, differentiable with respect
        to `pred` and `target`: 0-dim, or of pred's shape for "none".

    Raises:
        TypeError: `pred`, `target` or `weight` is not a tensor.
        ValueError: a shape, dtype, device, reduction or backend that does not fit; a weight that
            requires grad.
        RuntimeError: `backend="fused"` and no compiled kernel supports the input.
    """
    rule = make_masked_rule(weight, reduction)
    loss = loss_by_rule(pred, target, rule, False, check_backend(backend))
    assert isinstance(loss, Tensor)
    return loss


def loss_by_rule(
    pred: Tensor, target: Tensor, rule: Rule, return_stats: bool, backend: str
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """`fcrn_loss` with settings that were checked before."""
    check(pred, target, rule)
    is_number = rule.has_kinds and not isinstance(rule.negative_weight, Tensor)
    if is_number and torch.compiler.is_compiling():
        # A Python float would be compiled in as a constant: each new value would recompile.
        one = torch.ones((), dtype=torch.float64, device=pred.device)
        rule = Rule(one * rule.negative_weight, *rule[1:])
    if backend == "reference" or not _use_fused(pred, target, rule, backend):
        return reference.loss_by_rule(pred, target, rule, return_stats)
    needs_grad = torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)
    stats: list[Any]
    # A Function is a constant in a graph of torch.export, and torch.jit cannot save one.
    if needs_grad and not (torch.compiler.is_compiling() or is_jit_tracing()):
        apply: Any = FCRNLossFunction.apply
        loss, *stats = apply(pred, target, *rule, return_stats)
    else:
        arguments = ops.op_arguments(pred, rule)
        if is_traced():
            loss, parts, num_positive = ops.forward(pred, target, arguments)
        else:
            arguments = ops.without_cpu_weights(pred, arguments)
            loss, parts, num_positive = ops.run_forward(pred, target, arguments, return_stats)
        stats = [*parts.unbind(), num_positive] if parts is not None else []
    return (loss, FCRNLossStats(*stats)) if return_stats else loss


def _use_fused(pred: Tensor, target: Tensor, rule: Rule, backend: str) -> bool:
    """Whether compiled kernels support the input; if not and they were asked for, raises."""
    transform = _active_transform(pred, target)
    reason = transform or ops.why_not(pred.device.type, pred.device.index)
    most = ops.MAX_DIMS if rule.has_kinds else ops.MAX_DIMS - 1
    if reason is None and pred.dim() > most:
        merged = pred.is_contiguous() and target.is_contiguous() and rule.weight is None
        if not (merged and rule.positive is None):
            reason = f"more than {most} dimensions, and not all contiguous"
    if reason is None:
        return True
    if backend == "fused":
        raise RuntimeError(f'backend="fused" cannot serve this input: {reason}')
    if transform is None:
        _warn_once(f"fcrn_fused runs in plain PyTorch: {reason}")
    return False


def _active_transform(pred: Tensor, target: Tensor) -> str | None:
    """Why the kernels cannot be used: a functorch transform or forward-mode AD."""
    if torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling()  # which cannot trace the question
        and (_is_wrapped(pred) or _is_wrapped(target))  # it leaked out of a transform
    ):
        return "torch.func transforms differentiate and batch the reference only"
    if fwAD._current_level >= 0 and (_is_dual(pred) or _is_dual(target)):
        return "forward-mode AD differentiates the reference only"
    return None


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _is_dual(tensor: Tensor) -> bool:
    return fwAD.unpack_dual(tensor).tangent is not None


_warned = False


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=5)
