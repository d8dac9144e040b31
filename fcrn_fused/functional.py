"""`fcrn_loss` and `masked_mse_loss`: check the arguments and choose the backend."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from . import ops, reference
from .autograd import FCRNLossFunction
from .stats import FCRNLossStats
from .tracing import is_jit_tracing, is_traced
from .validation import Rule, check, check_backend, checked, make_masked_rule

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class _Keywords(TypedDict, total=False):
    """The keywords of `fcrn_loss` that do not change the type of its result."""

    negative_weight: float | Tensor
    positive_weight: float
    coord_weight: float | Sequence[float] | Tensor
    ignore_value: float | None
    weight: Tensor | None
    positive: Tensor | None
    reduction: str
    backend: str


@overload
def fcrn_loss(
    pred: Tensor, target: Tensor, *, return_stats: Literal[False] = ..., **kwargs: Unpack[_Keywords]
) -> Tensor: ...
@overload
def fcrn_loss(
    pred: Tensor, target: Tensor, *, return_stats: Literal[True], **kwargs: Unpack[_Keywords]
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
    - 0 on all maps where `t == ignore_value`.

    Elements whose weight is 0 by this table are skipped, not multiplied by 0: their error and
    gradient are exactly 0 even if they hold NaN or infinity. A 0 given as `negative_weight`,
    `positive_weight` or `coord_weight` is an ordinary weight and skips nothing.

    The loss is that of Gupta, Vedaldi, Zisserman, "Synthetic Data for Text Localisation in Natural
    Images" (CVPR 2016), after YOLO v1 (arXiv 1506.02640v1, eq. 2).

    Args:
        pred: predictions, (B, C, *S): C - 1 pose maps, then one confidence map; C = 7 and
            S = (H, W) for FCRN. float64, float32, float16 or bfloat16, any strides.
        target: ground truth, with the shape and device of `pred`, in any of the four dtypes. Use
            units of the cell or of the image, not pixels.
        negative_weight: weight of the confidence of negative cells: a number, or a 0-dim tensor,
            which is read on its device without synchronisation.
        positive_weight: weight of the confidence of positive cells.
        coord_weight: weight of the pose maps of positive cells: one number, a sequence of C - 1
            numbers, or a tensor of shape () or (C - 1,).
        ignore_value: target confidence of cells to ignore, compared in the dtype of `target`.
        weight: factor of `w`, bool or floating point, on the device of `pred`. It has as many
            dimensions as `pred`, each of that size or 1: (B, 1, *S) for cells, (B, C, 1, 1) for
            maps. It may also be 0-dim, on the CPU too. Elements where it is 0 are skipped; a cell
            whose confidence is skipped is not counted as positive.
        positive: which cells are positive, in place of `t > 0`: bool, (B, 1, *S) or broadcastable
            to that.
        reduction: "mean" divides the sum of E by its number of elements, "batchmean" by B,
            "positive" by the number of positive cells (at least 1), and "sum" does not divide;
            "cell" is the mean over the C maps of each cell, (B, *S); "none" is E, (B, C, *S).
        return_stats: return `(loss, FCRNLossStats)`.
        backend: "fused" for the compiled kernels, "reference" for plain PyTorch, "auto" for the
            compiled kernels where they support the input and plain PyTorch elsewhere.

    Returns:
        The loss, differentiable with respect to `pred` and `target`, in the wider of their dtypes,
        at least float32. With `return_stats`, the loss and its detached parts.

    Raises:
        TypeError: `pred`, `target`, `weight` or `positive` is not a tensor, or another weight is
            not a number.
        ValueError: a shape, dtype, device, weight, reduction, ignore_value or backend is not
            valid, or a weight requires grad.
        RuntimeError: `backend="fused"`, but the compiled kernels do not support the input.
    """
    rule = Rule(
        negative_weight, positive_weight, coord_weight, ignore_value, reduction, weight, positive
    )
    return loss_by_rule(pred, target, checked(rule), return_stats, check_backend(backend))


def masked_mse_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error with a mask or weights: `E = weight * (pred - target)**2`.

    Elements whose weight is 0 are skipped: their error and gradient are exactly 0 even if they hold
    NaN or infinity. A weight is never expanded in memory.

    Args:
        pred: predictions of any shape; float64, float32, float16 or bfloat16, any strides.
        target: ground truth, with the shape and device of `pred`, in any of the four dtypes.
        weight: a mask (bool, True counts) or weights (floating point), on the device of `pred`,
            with as many dimensions as `pred`, each of that size or 1; or 0-dim, on the CPU too.
            None is 1. Pass a mask (B, H, W) for a pred (B, C, H, W) as `mask.unsqueeze(1)`.
        reduction: "mean" divides the sum of E by the sum of the weights of all elements, as
            `F.mse_loss(weight=weight)` does, and is 0 where that sum is 0; "sum" does not divide;
            "none" is E.
        backend: as in `fcrn_loss`.

    Returns:
        The loss, differentiable with respect to `pred` and `target`, in the wider of their dtypes,
        at least float32: 0-dim, or of the shape of `pred` for "none".

    Raises:
        TypeError: `pred`, `target` or `weight` is not a tensor.
        ValueError: a shape, dtype, device, reduction or backend is not valid, or `weight` requires
            grad.
        RuntimeError: `backend="fused"`, but the compiled kernels do not support the input.
    """
    rule = make_masked_rule(weight, reduction)
    loss = loss_by_rule(pred, target, rule, False, check_backend(backend))
    assert isinstance(loss, Tensor)
    return loss


def loss_by_rule(
    pred: Tensor, target: Tensor, rule: Rule, return_stats: bool, backend: str
) -> Tensor | tuple[Tensor, FCRNLossStats]:
    """`fcrn_loss` or `masked_mse_loss` with a rule whose settings are `checked`."""
    check(pred, target, rule)
    is_number = rule.has_kinds and not isinstance(rule.negative_weight, Tensor)
    if is_number and torch.compiler.is_compiling():
        # Dynamo would treat a float as a constant and recompile for each new value.
        one = torch.ones((), dtype=torch.float64, device=pred.device)
        rule = Rule(one * rule.negative_weight, *rule[1:])
    if backend == "reference" or not _use_fused(pred, target, rule, backend):
        return reference.loss_by_rule(pred, target, rule, return_stats)
    needs_grad = torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)
    stats: list[Any]
    # torch.export makes a Function a constant of its graph, and torch.jit cannot save one.
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
    """Whether the compiled kernels support the input; RuntimeError if not and backend="fused"."""
    transform = _active_transform(pred, target)
    reason = transform or ops.why_not(pred.device.type, pred.device.index)
    most = ops.MAX_DIMS if rule.has_kinds else ops.MAX_DIMS - 1
    if reason is None and pred.dim() > most:
        merged = pred.is_contiguous() and target.is_contiguous() and rule.weight is None
        if not (merged and rule.positive is None):
            reason = f"it has more than {most} dimensions, not all of them contiguous"
    if reason is None:
        return True
    if backend == "fused":
        raise RuntimeError(f'backend="fused" does not support this input: {reason}')
    if transform is None:
        _warn_once(f"fcrn_fused falls back to plain PyTorch: {reason}")
    return False


def _active_transform(pred: Tensor, target: Tensor) -> str | None:
    """Why only the reference will do: a functorch transform, forward-mode AD, or None."""
    if torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling()  # Dynamo cannot trace the next line
        and (_is_wrapped(pred) or _is_wrapped(target))  # leaked out of a transform
    ):
        return "torch.func transforms are supported by the reference only"
    if fwAD._current_level >= 0 and (_is_dual(pred) or _is_dual(target)):
        return "forward-mode AD is supported by the reference only"
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
