"""The autograd node of the fused loss: who keeps the gradient, and when it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .validation import Rule

_SCALAR_REDUCTIONS = ("mean", "sum", "batchmean", "positive")


class FCRNLossFunction(torch.autograd.Function):
    """The fused loss as an `autograd.Function`; `fcrn_fused.fcrn_loss` checks and calls it.

    `apply(pred, target, negative_weight, positive_weight, coord_weight, ignore_value, reduction)`
    returns `(loss, coord, positive_conf, negative_conf, num_positive)`, positional arguments only;
    the loss alone is differentiable. `coord_weight` is a number, a sequence of C - 1 numbers or a
    tensor; the rest is as in `fcrn_loss`. One more argument, False, leaves out the four parts.

    In eager mode the forward launch writes the gradient for a grad_output of 1 as well. It is kept
    as a plain attribute and handed out once: kept by `save_for_backward`, a second backward would
    find that its owner has changed it. Where grad_output is not 1, the backward launch puts it
    right in place; later backwards, traced code, float16 (which must not be rounded before a loss
    scale is applied) and reductions with a result for each cell compute it then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        negative_weight: float | Tensor,
        positive_weight: float,
        coord_weight: float | Sequence[float] | Tensor,
        ignore_value: float | None,
        reduction: str,
        return_stats: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        keep_grad = (
            ctx.needs_input_grad[0]
            and reduction in _SCALAR_REDUCTIONS
            and pred.dtype is not torch.float16
            and not torch.compiler.is_compiling()
        )
        rule = (negative_weight, positive_weight, coord_weight, ignore_value, reduction)
        result = ops.forward(pred, target, rule, keep_grad, return_stats or reduction == "positive")
        if keep_grad:
            ctx.kept_grad = result.pop()
        ctx.rule = rule
        ctx.save_for_backward(
            pred,
            target,
            # saved to be noticed when they are changed in place before backward
            negative_weight if isinstance(negative_weight, Tensor) else None,
            coord_weight if isinstance(coord_weight, Tensor) else None,
            result[4] if reduction == "positive" else None,
        )
        if not return_stats:
            return result[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # the parts of the loss were used, the loss was not
            return (None,) * 8
        kept_grad = None
        if not torch.compiler.is_compiling():  # traced, nothing is kept; PyTorch 2.11 trips over it
            kept_grad = vars(ctx).pop("kept_grad", None)  # given away once
        grad_pred = grad_target = None
        needs_pred, needs_target = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: must be differentiable in its turn
            pred, target = ctx.saved_tensors[:2]
            grad = reference.gradient(grad_output, pred, target, Rule(*ctx.rule))
            grad_pred = grad.to(pred.dtype) if needs_pred else None
            grad_target = -grad.to(target.dtype) if needs_target else None
            return grad_pred, grad_target, None, None, None, None, None, None

        if (
            kept_grad is not None
            and not needs_target
            and ctx.rule[-1] != "positive"
            # on the CPU a look at the value costs less than the operator that would look
            and grad_output.is_cpu
            and type(grad_output) is Tensor  # a fake one has no value
            and grad_output.item() == 1.0
        ):
            return kept_grad, None, None, None, None, None, None, None
        pred, target, _, _, num_positive = ctx.saved_tensors
        if kept_grad is not None:
            grad_pred = kept_grad
            ops.rescale_(grad_pred, grad_output, pred, target, ctx.rule, num_positive)
        elif needs_pred:
            grad_pred = ops.backward(grad_output, pred, target, ctx.rule, num_positive)
        if needs_target:
            grad_target = ops.backward(
                grad_output, pred, target, ctx.rule, num_positive, wrt_target=True
            )
        return grad_pred, grad_target, None, None, None, None, None, None
